#!/usr/bin/env bash
# NAYER, CVPR 2024 (arXiv 2310.00258), with label codes that need no prior; the paper's: --label_embedding clip.
# cifar10, vgg11 -> resnet18.
# Settings: published.
# The paper's acc1 (best test epoch): 92.37 %.
# Needs one GPU and checkpoints/pretrained/cifar10_vgg11.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method nayer --dataset cifar10 --teacher vgg11 \
  --student resnet18 "$@"
