#!/usr/bin/env bash
# NAYER, CVPR 2024 (arXiv 2310.00258), with label codes that need no prior; the paper's: --label_embedding clip.
# cifar100, wrn40_2 -> wrn16_2.
# Settings: published.
# The paper's acc1 (best test epoch): 71.72 %.
# Needs one GPU and checkpoints/pretrained/cifar100_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method nayer --dataset cifar100 --teacher wrn40_2 \
  --student wrn16_2 --g_steps 40 "$@"
