#!/usr/bin/env bash
# DiffDFKD, ICME 2025 (arXiv 2504.00870), Stable Diffusion 1.5.
# cifar10, initial image bank of vgg11 (50,000 images).
# Settings: published for CIFAR-10, resnet34 and wrn40_2, except that 16 images are generated together (published: one).
# Needs one GPU and checkpoints/pretrained/cifar10_vgg11.pth.
# Makes checkpoints/diffdfkd/cifar10_vgg11_initBank/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset cifar10 --teacher vgg11 \
  --stages generate --save_dir checkpoints/diffdfkd/cifar10_vgg11_initBank \
  --scheduler ancestral --batch_classes one --lca_every 0 --num_inference_steps 50 "$@"
