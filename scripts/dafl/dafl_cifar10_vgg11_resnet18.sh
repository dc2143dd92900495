#!/usr/bin/env bash
# DAFL, ICCV 2019 (arXiv 1904.01186).
# cifar10, vgg11 -> resnet18.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# The paper's acc1 (best test epoch): 81.10 %.
# Needs one GPU and checkpoints/pretrained/cifar10_vgg11.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dafl --dataset cifar10 --teacher vgg11 \
  --student resnet18 "$@"
