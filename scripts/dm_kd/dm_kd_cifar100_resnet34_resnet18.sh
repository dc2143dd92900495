#!/usr/bin/env bash
# DM-KD (arXiv 2305.12954), Stable Diffusion 1.5: DiffDFKD without guidance.
# cifar100, resnet34 -> resnet18.
# Settings: those of DiffDFKD without guidance; DM-KD itself draws its images with a DiT.
# The paper's acc1 (best test epoch): 76.58 %.
# Needs one GPU. First: bash scripts/dm_kd/dm_kd_cifar100_initBank_resnet34.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset cifar100 --teacher resnet34 \
  --student resnet18 --init_bank checkpoints/dm_kd/cifar100_resnet34_initBank/bank \
  --save_dir checkpoints/dm_kd/cifar100_resnet34_resnet18_seed{seed} "$@"
