#!/usr/bin/env bash
# Distillation on crops of one picture (arXiv 2112.00725); needs --image FILE.
# cifar10, resnet34 -> resnet18.
# Settings: student steps and learning rates as for the methods.
# Needs one GPU and checkpoints/pretrained/cifar10_resnet34.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method one_image --dataset cifar10 --teacher resnet34 \
  --student resnet18 "$@"
