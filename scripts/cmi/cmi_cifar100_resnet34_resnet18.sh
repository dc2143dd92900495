#!/usr/bin/env bash
# CMI, IJCAI 2021 (arXiv 2105.08584).
# cifar100, resnet34 -> resnet18.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# The paper's acc1 (best test epoch): 77.04 %.
# Needs one GPU. First: bash scripts/cmi/cmi_cifar100_initBank_resnet34.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method cmi --dataset cifar100 --teacher resnet34 \
  --student resnet18 --epochs 40 --g_steps 200 --synthesis_batch_size 256 --oh 0.5 --cr_T 0.1 \
  --init_bank checkpoints/cmi/cifar100_resnet34_initBank/bank "$@"
