#!/usr/bin/env bash
# CMI, IJCAI 2021 (arXiv 2105.08584).
# cifar10, wrn40_2 -> wrn40_1.
# Settings: published for CIFAR-10, wrn40_2 -> wrn16_1.
# The paper's acc1 (best test epoch): 92.78 %.
# Needs one GPU. First: bash scripts/cmi/cmi_cifar10_initBank_wrn402.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method cmi --dataset cifar10 --teacher wrn40_2 \
  --student wrn40_1 --epochs 40 --g_steps 200 --synthesis_batch_size 256 --oh 0.5 --cr_T 0.1 \
  --init_bank checkpoints/cmi/cifar10_wrn40_2_initBank/bank "$@"
