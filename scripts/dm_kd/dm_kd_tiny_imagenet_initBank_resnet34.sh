#!/usr/bin/env bash
# DM-KD (arXiv 2305.12954), Stable Diffusion 1.5: DiffDFKD without guidance.
# tiny_imagenet, initial image bank of resnet34 (50,000 images).
# Settings: those of DiffDFKD without guidance; DM-KD itself draws its images with a DiT.
# Needs one GPU and checkpoints/pretrained/tiny_imagenet_resnet34.pth.
# Makes checkpoints/dm_kd/tiny_imagenet_resnet34_initBank/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset tiny_imagenet --teacher resnet34 \
  --stages generate --save_dir checkpoints/dm_kd/tiny_imagenet_resnet34_initBank \
  --oh 0 --bn 0 --adv 0 --lca_every 0 --scheduler ancestral --num_inference_steps 10 --images_per_class 250 "$@"
