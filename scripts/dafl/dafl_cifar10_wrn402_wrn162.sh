#!/usr/bin/env bash
# DAFL, ICCV 2019 (arXiv 1904.01186).
# cifar10, wrn40_2 -> wrn16_2.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# The paper's acc1 (best test epoch): 81.55 %.
# Needs one GPU and checkpoints/pretrained/cifar10_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dafl --dataset cifar10 --teacher wrn40_2 \
  --student wrn16_2 "$@"
