#!/usr/bin/env bash
# DM-KD (arXiv 2305.12954), Stable Diffusion 1.5: DiffDFKD without guidance.
# tiny_imagenet, vgg11 -> resnet18.
# Settings: those of DiffDFKD without guidance; DM-KD itself draws its images with a DiT.
# Needs one GPU. First: bash scripts/dm_kd/dm_kd_tiny_imagenet_initBank_vgg11.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset tiny_imagenet --teacher vgg11 \
  --student resnet18 --init_bank checkpoints/dm_kd/tiny_imagenet_vgg11_initBank/bank \
  --save_dir checkpoints/dm_kd/tiny_imagenet_vgg11_resnet18_seed{seed} "$@"
