#!/usr/bin/env bash
# DDA, ACM MM 2024 (arXiv 2410.17606).
# cifar100, vgg11 -> resnet18.
# Settings: published for CSD; none are published for the diffusion stage, whose prior is trained here.
# Needs one GPU. First: bash scripts/csd/csd_cifar100_initBank_vgg11.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dda --dataset cifar100 --teacher vgg11 \
  --student resnet18 --init_bank checkpoints/csd/cifar100_vgg11_initBank/bank "$@"
