#!/usr/bin/env bash
# Distillation on noise, the lower bound; with --images FOLDER, on unrelated pictures.
# cifar100, resnet34 -> resnet18.
# Settings: student steps and learning rates as for the methods.
# Needs one GPU and checkpoints/pretrained/cifar100_resnet34.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method noise --dataset cifar100 --teacher resnet34 \
  --student resnet18 "$@"
