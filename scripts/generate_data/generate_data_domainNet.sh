#!/usr/bin/env bash
# DiffDFKD, ICME 2025 (arXiv 2504.00870): 200 images per class for ten classes of one domain of DomainNet, drawn by Stable
# Diffusion 1.5 under the teacher's guidance (bn 0.1, oh 1, adv 1 from 20 images per class on).
# Settings: published. Their prompt leaves the class to the guidance; --prompt "an image of {label}" includes it.
# Needs one GPU (24 GB: add --diffusion_batch_size 4 --gradient_checkpointing).
# First: bash scripts/train_from_scratch/domainnet.sh
# DOMAIN=quickdraw bash ... uses another domain than sketch. Makes checkpoints/diffdfkd/domainnet_<domain>_generated/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --stages generate --dataset domainnet --domain "${DOMAIN:-sketch}" \
  --teacher resnet34_imagenet --student resnet18_imagenet --guidance_scale 7 --num_inference_steps 70 --adv 1 \
  --adv_lr 0.1 --adv_batch_size 256 --scheduler ancestral --batch_classes one --lca_every 0 \
  --images_per_class 200 --prompt "an image." \
  --save_dir "checkpoints/diffdfkd/domainnet_${DOMAIN:-sketch}_generated" "$@"
