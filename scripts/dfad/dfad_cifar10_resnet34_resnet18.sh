#!/usr/bin/env bash
# DFAD, 2019 (arXiv 1912.11006).
# cifar10, resnet34 -> resnet18.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1, except the generator's learning rate, which falls as in the paper.
# Needs one GPU and checkpoints/pretrained/cifar10_resnet34.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dfad --dataset cifar10 --teacher resnet34 \
  --student resnet18 "$@"
