#!/usr/bin/env bash
# DeepInversion, CVPR 2020 (arXiv 1912.08795).
# cifar10, resnet34 -> resnet18.
# Settings: those of ADI without its competition term.
# Needs one GPU and checkpoints/pretrained/cifar10_resnet34.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method deepinv --dataset cifar10 --teacher resnet34 \
  --student resnet18 --g_steps 2000 "$@"
