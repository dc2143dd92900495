#!/usr/bin/env bash
# NAYER, CVPR 2024 (arXiv 2310.00258), prior-free label codes; --label_embedding clip for the paper's:
# cifar10, vgg11 -> resnet18; published settings.
# The paper's acc1 (best test epoch): 92.37 %.
# One GPU. Wants checkpoints/pretrained/cifar10_vgg11.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method nayer --dataset cifar10 --teacher vgg11 \
  --student resnet18 "$@"
