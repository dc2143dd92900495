#!/usr/bin/env bash
# Fast-10, AAAI 2022 (arXiv 2112.06253); Fast-5: --g_steps 5 --lr_g 3e-3; Fast-2: --g_steps 2 --lr_g 5e-3 --lr_z .015.
# cifar100, wrn40_2 -> wrn16_2.
# Settings: published.
# The paper's acc1 (best test epoch): 65.12 %.
# Needs one GPU and checkpoints/pretrained/cifar100_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method fast --dataset cifar100 --teacher wrn40_2 \
  --student wrn16_2 "$@"
