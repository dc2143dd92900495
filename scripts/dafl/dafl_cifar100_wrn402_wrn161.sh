#!/usr/bin/env bash
# DAFL, ICCV 2019 (arXiv 1904.01186).
# cifar100, wrn40_2 -> wrn16_1.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# The paper's acc1 (best test epoch): 20.88 %.
# Needs one GPU and checkpoints/pretrained/cifar100_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dafl --dataset cifar100 --teacher wrn40_2 \
  --student wrn16_1 "$@"
