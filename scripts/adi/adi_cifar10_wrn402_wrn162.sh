#!/usr/bin/env bash
# Adaptive DeepInversion, CVPR 2020 (arXiv 1912.08795).
# cifar10, wrn40_2 -> wrn16_2.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1, except the number of steps.
# The paper's acc1 (best test epoch): 89.72 %.
# Needs one GPU and checkpoints/pretrained/cifar10_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method adi --dataset cifar10 --teacher wrn40_2 \
  --student wrn16_2 --g_steps 2000 "$@"
