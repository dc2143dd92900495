#!/usr/bin/env bash
# DeepInversion, CVPR 2020 (arXiv 1912.08795).
# cifar100, wrn40_2 -> wrn16_2.
# Settings: those of ADI without its competition term.
# Needs one GPU and checkpoints/pretrained/cifar100_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method deepinv --dataset cifar100 --teacher wrn40_2 \
  --student wrn16_2 --g_steps 2000 "$@"
