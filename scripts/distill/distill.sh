#!/usr/bin/env bash
# DiffDFKD, ICME 2025 (arXiv 2504.00870): resnet34 -> resnet18 at 224 px on the images of one domain of DomainNet.
# Settings: published (T 30, batch 256, crops of 8 to 100 %, at most 4,500 images per class), except a cosine schedule in place of
# learning rate steps.
# Needs one GPU. First: bash scripts/generate_data/generate_data_domainNet.sh
# DOMAIN=quickdraw bash ... uses another domain than sketch.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset domainnet --domain "${DOMAIN:-sketch}" \
  --teacher resnet34_imagenet --student resnet18_imagenet \
  --init_bank "checkpoints/diffdfkd/domainnet_${DOMAIN:-sketch}_generated/bank" \
  --student_crop resized --student_images_per_class 4500 --epochs 220 --lr 0.1 --weight_decay 1e-4 --warmup_epochs 0 "$@"
