#!/usr/bin/env bash
# DDA, ACM MM 2024 (arXiv 2410.17606):
# cifar10, initial image bank of resnet34 (80,000 images); CSD's published settings; for the diffusion stage none are, and its prior is trained here.
# One GPU. Wants checkpoints/pretrained/cifar10_resnet34.pth; makes checkpoints/dda/cifar10_resnet34_initBank/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dda --dataset cifar10 --teacher resnet34 \
  --stages synthesize --save_dir checkpoints/dda/cifar10_resnet34_initBank "$@"
