#!/usr/bin/env bash
# CSD, ICME 2023 (arXiv 2307.04542).
# cifar100, resnet34 -> resnet18.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# Needs one GPU. First: bash scripts/csd/csd_cifar100_initBank_resnet34.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method csd --dataset cifar100 --teacher resnet34 \
  --student resnet18 --init_bank checkpoints/csd/cifar100_resnet34_initBank/bank "$@"
