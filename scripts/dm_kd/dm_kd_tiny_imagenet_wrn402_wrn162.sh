#!/usr/bin/env bash
# DM-KD (arXiv 2305.12954), Stable Diffusion 1.5: DiffDFKD without guidance.
# tiny_imagenet, wrn40_2 -> wrn16_2.
# Settings: those of DiffDFKD without guidance; DM-KD itself draws its images with a DiT.
# Needs one GPU. First: bash scripts/dm_kd/dm_kd_tiny_imagenet_initBank_wrn402.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset tiny_imagenet --teacher wrn40_2 \
  --student wrn16_2 --init_bank checkpoints/dm_kd/tiny_imagenet_wrn40_2_initBank/bank \
  --save_dir checkpoints/dm_kd/tiny_imagenet_wrn40_2_wrn16_2_seed{seed} "$@"
