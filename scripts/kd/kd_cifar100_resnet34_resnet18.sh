#!/usr/bin/env bash
# Ordinary distillation on the real training images, the upper bound (arXiv 1503.02531).
# cifar100, resnet34 -> resnet18.
# Settings: student steps and learning rates as for the methods.
# Needs one GPU and checkpoints/pretrained/cifar100_resnet34.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method kd --dataset cifar100 --teacher resnet34 \
  --student resnet18 "$@"
