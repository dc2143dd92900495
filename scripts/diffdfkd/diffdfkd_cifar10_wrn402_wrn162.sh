#!/usr/bin/env bash
# DiffDFKD, ICME 2025 (arXiv 2504.00870), Stable Diffusion 1.5.
# cifar10, wrn40_2 -> wrn16_2.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_2.
# Needs one GPU. First: bash scripts/diffdfkd/diffdfkd_cifar10_initBank_wrn402.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset cifar10 --teacher wrn40_2 \
  --student wrn16_2 --init_bank checkpoints/diffdfkd/cifar10_wrn40_2_initBank/bank "$@"
