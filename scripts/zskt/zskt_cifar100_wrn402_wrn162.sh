#!/usr/bin/env bash
# ZSKT, NeurIPS 2019 (arXiv 1905.09768).
# cifar100, wrn40_2 -> wrn16_2.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1, except attention and the falling --lr_g, which are the paper's.
# The paper's acc1 (best test epoch): 54.59 %.
# Needs one GPU and checkpoints/pretrained/cifar100_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method zskt --dataset cifar100 --teacher wrn40_2 \
  --student wrn16_2 "$@"
