#!/usr/bin/env bash
# DM-KD (arXiv 2305.12954), Stable Diffusion 1.5: DiffDFKD without guidance.
# cifar10, initial image bank of vgg11 (50,000 images).
# Settings: those of DiffDFKD without guidance; DM-KD itself draws its images with a DiT.
# Needs one GPU and checkpoints/pretrained/cifar10_vgg11.pth.
# Makes checkpoints/dm_kd/cifar10_vgg11_initBank/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset cifar10 --teacher vgg11 \
  --stages generate --save_dir checkpoints/dm_kd/cifar10_vgg11_initBank \
  --oh 0 --bn 0 --adv 0 --lca_every 0 --scheduler ancestral --num_inference_steps 50 "$@"
