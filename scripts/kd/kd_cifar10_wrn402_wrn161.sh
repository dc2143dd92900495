#!/usr/bin/env bash
# Ordinary distillation on the real training images, the upper bound (arXiv 1503.02531).
# cifar10, wrn40_2 -> wrn16_1.
# Settings: student steps and learning rates as for the methods.
# Needs one GPU and checkpoints/pretrained/cifar10_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method kd --dataset cifar10 --teacher wrn40_2 \
  --student wrn16_1 "$@"
