#!/usr/bin/env bash
# DiffDFKD, ICME 2025 (arXiv 2504.00870), Stable Diffusion 1.5.
# cifar100, vgg11 -> resnet18.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_2.
# Needs one GPU. First: bash scripts/diffdfkd/diffdfkd_cifar100_initBank_vgg11.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset cifar100 --teacher vgg11 \
  --student resnet18 --init_bank checkpoints/diffdfkd/cifar100_vgg11_initBank/bank "$@"
