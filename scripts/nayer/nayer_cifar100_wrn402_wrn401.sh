#!/usr/bin/env bash
# NAYER, CVPR 2024 (arXiv 2310.00258), prior-free label codes; --label_embedding clip for the paper's:
# cifar100, wrn40_2 -> wrn40_1; published settings.
# The paper's acc1 (best test epoch): 71.80 %.
# One GPU. Wants checkpoints/pretrained/cifar100_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method nayer --dataset cifar100 --teacher wrn40_2 \
  --student wrn40_1 --g_steps 40 "$@"
