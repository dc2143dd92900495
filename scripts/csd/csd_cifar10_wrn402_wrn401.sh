#!/usr/bin/env bash
# CSD, ICME 2023 (arXiv 2307.04542).
# cifar10, wrn40_2 -> wrn40_1.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# Needs one GPU. First: bash scripts/csd/csd_cifar10_initBank_wrn402.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method csd --dataset cifar10 --teacher wrn40_2 \
  --student wrn40_1 --init_bank checkpoints/csd/cifar10_wrn40_2_initBank/bank "$@"
