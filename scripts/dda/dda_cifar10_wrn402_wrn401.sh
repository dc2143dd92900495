#!/usr/bin/env bash
# DDA, ACM MM 2024 (arXiv 2410.17606).
# cifar10, wrn40_2 -> wrn40_1.
# Settings: published for CSD; none are published for the diffusion stage, whose prior is trained here.
# Needs one GPU. First: bash scripts/csd/csd_cifar10_initBank_wrn402.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dda --dataset cifar10 --teacher wrn40_2 \
  --student wrn40_1 --init_bank checkpoints/csd/cifar10_wrn40_2_initBank/bank "$@"
