#!/usr/bin/env bash
# CMI, IJCAI 2021 (arXiv 2105.08584):
# cifar100, initial image bank of vgg11 (80,000 images); published settings.
# acc1: not measured yet. Time: not measured yet. Device: one GPU.
# Wants checkpoints/pretrained/cifar100_vgg11.pth; makes checkpoints/cmi/cifar100_vgg11_initBank/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method cmi --dataset cifar100 --teacher vgg11 \
  --stages synthesize --save_dir checkpoints/cmi/cifar100_vgg11_initBank "$@"
