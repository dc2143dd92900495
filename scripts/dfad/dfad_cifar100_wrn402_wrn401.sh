#!/usr/bin/env bash
# DFAD, 2019 (arXiv 1912.11006).
# cifar100, wrn40_2 -> wrn40_1.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1, except the generator's learning rate, which falls as in the paper.
# Needs one GPU and checkpoints/pretrained/cifar100_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dfad --dataset cifar100 --teacher wrn40_2 \
  --student wrn40_1 "$@"
