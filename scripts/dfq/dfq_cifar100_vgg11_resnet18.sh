#!/usr/bin/env bash
# DFQ, CVPRW 2020 (arXiv 2005.04136).
# cifar100, vgg11 -> resnet18.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1, and for CIFAR-100, resnet34 -> resnet18.
# The paper's acc1 (best test epoch): 66.21 %.
# Needs one GPU and checkpoints/pretrained/cifar100_vgg11.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dfq --dataset cifar100 --teacher vgg11 \
  --student resnet18 "$@"
