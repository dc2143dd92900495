#!/usr/bin/env bash
# CSD, ICME 2023 (arXiv 2307.04542).
# tiny_imagenet, vgg11 -> resnet18.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# Needs one GPU. First: bash scripts/csd/csd_tiny_imagenet_initBank_vgg11.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method csd --dataset tiny_imagenet --teacher vgg11 \
  --student resnet18 --init_bank checkpoints/csd/tiny_imagenet_vgg11_initBank/bank "$@"
