#!/usr/bin/env bash
# Fast-10, AAAI 2022 (arXiv 2112.06253); --g_steps 5 --lr_g 3e-3, or 2 and 5e-3 --lr_z .015, for Fast-5, -2:
# cifar100, wrn40_2 -> wrn16_2; published settings.
# The paper's acc1 (best test epoch): 65.12 %.
# One GPU. Wants checkpoints/pretrained/cifar100_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method fast --dataset cifar100 --teacher wrn40_2 \
  --student wrn16_2 "$@"
