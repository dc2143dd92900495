#!/usr/bin/env bash
# distillation on crops of one picture (arXiv 2112.00725): give --image FILE:
# cifar10, resnet34 -> resnet18; steps and rates as the methods'.
# One GPU. Wants checkpoints/pretrained/cifar10_resnet34.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method one_image --dataset cifar10 --teacher resnet34 \
  --student resnet18 "$@"
