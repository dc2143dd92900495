#!/usr/bin/env bash
# CSD, ICME 2023 (arXiv 2307.04542).
# cifar10, initial image bank of vgg11 (80,000 images).
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# Needs one GPU and checkpoints/pretrained/cifar10_vgg11.pth.
# Makes checkpoints/csd/cifar10_vgg11_initBank/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method csd --dataset cifar10 --teacher vgg11 \
  --stages synthesize --save_dir checkpoints/csd/cifar10_vgg11_initBank "$@"
