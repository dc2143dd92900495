#!/usr/bin/env bash
# DDA, ACM MM 2024 (arXiv 2410.17606).
# tiny_imagenet, initial image bank of vgg11 (80,000 images, shared with csd).
# Settings: published for CSD; none are published for the diffusion stage, whose prior is trained here.
# Needs one GPU and checkpoints/pretrained/tiny_imagenet_vgg11.pth.
# Makes checkpoints/csd/tiny_imagenet_vgg11_initBank/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method csd --dataset tiny_imagenet --teacher vgg11 \
  --stages synthesize --save_dir checkpoints/csd/tiny_imagenet_vgg11_initBank "$@"
