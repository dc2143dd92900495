#!/usr/bin/env bash
# Distillation on crops of one picture (arXiv 2112.00725); needs --image FILE.
# cifar10, wrn40_2 -> wrn40_1.
# Settings: student steps and learning rates as for the methods.
# Needs one GPU and checkpoints/pretrained/cifar10_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method one_image --dataset cifar10 --teacher wrn40_2 \
  --student wrn40_1 "$@"
