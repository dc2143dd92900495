#!/usr/bin/env bash
# CSD, ICME 2023 (arXiv 2307.04542).
# cifar100, vgg11 -> resnet18.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# Needs one GPU. First: bash scripts/csd/csd_cifar100_initBank_vgg11.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method csd --dataset cifar100 --teacher vgg11 \
  --student resnet18 --init_bank checkpoints/csd/cifar100_vgg11_initBank/bank "$@"
