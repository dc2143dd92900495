#!/usr/bin/env bash
# NAYER, CVPR 2024 (arXiv 2310.00258), with label codes that need no prior; the paper's: --label_embedding clip.
# cifar100, resnet34 -> resnet18.
# Settings: published.
# The paper's acc1 (best test epoch): 77.54 %.
# Needs one GPU and checkpoints/pretrained/cifar100_resnet34.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method nayer --dataset cifar100 --teacher resnet34 \
  --student resnet18 --g_steps 40 "$@"
