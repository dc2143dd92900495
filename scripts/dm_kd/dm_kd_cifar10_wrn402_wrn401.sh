#!/usr/bin/env bash
# DM-KD (arXiv 2305.12954), Stable Diffusion 1.5: DiffDFKD without guidance.
# cifar10, wrn40_2 -> wrn40_1.
# Settings: those of DiffDFKD without guidance; DM-KD itself draws its images with a DiT.
# Needs one GPU. First: bash scripts/dm_kd/dm_kd_cifar10_initBank_wrn402.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset cifar10 --teacher wrn40_2 \
  --student wrn40_1 --init_bank checkpoints/dm_kd/cifar10_wrn40_2_initBank/bank \
  --save_dir checkpoints/dm_kd/cifar10_wrn40_2_wrn40_1_seed{seed} "$@"
