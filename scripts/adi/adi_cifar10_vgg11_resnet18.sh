#!/usr/bin/env bash
# Adaptive DeepInversion, CVPR 2020 (arXiv 1912.08795).
# cifar10, vgg11 -> resnet18.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1, except the number of steps.
# The paper's acc1 (best test epoch): 90.36 %.
# Needs one GPU and checkpoints/pretrained/cifar10_vgg11.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method adi --dataset cifar10 --teacher vgg11 \
  --student resnet18 --g_steps 2000 "$@"
