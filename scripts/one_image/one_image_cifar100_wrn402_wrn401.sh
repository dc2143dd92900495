#!/usr/bin/env bash
# distillation on crops of one picture (arXiv 2112.00725): give --image FILE:
# cifar100, wrn40_2 -> wrn40_1; steps and rates as the methods'.
# One GPU. Wants checkpoints/pretrained/cifar100_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method one_image --dataset cifar100 --teacher wrn40_2 \
  --student wrn40_1 "$@"
