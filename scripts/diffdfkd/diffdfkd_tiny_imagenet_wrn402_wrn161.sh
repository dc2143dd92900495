#!/usr/bin/env bash
# DiffDFKD, ICME 2025 (arXiv 2504.00870), Stable Diffusion 1.5.
# tiny_imagenet, wrn40_2 -> wrn16_1.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_2.
# Needs one GPU. First: bash scripts/diffdfkd/diffdfkd_tiny_imagenet_initBank_wrn402.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset tiny_imagenet --teacher wrn40_2 \
  --student wrn16_1 --init_bank checkpoints/diffdfkd/tiny_imagenet_wrn40_2_initBank/bank "$@"
