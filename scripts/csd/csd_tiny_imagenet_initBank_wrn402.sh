#!/usr/bin/env bash
# CSD, ICME 2023 (arXiv 2307.04542).
# tiny_imagenet, initial image bank of wrn40_2 (80,000 images).
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# Needs one GPU and checkpoints/pretrained/tiny_imagenet_wrn40_2.pth.
# Makes checkpoints/csd/tiny_imagenet_wrn40_2_initBank/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method csd --dataset tiny_imagenet --teacher wrn40_2 \
  --stages synthesize --save_dir checkpoints/csd/tiny_imagenet_wrn40_2_initBank "$@"
