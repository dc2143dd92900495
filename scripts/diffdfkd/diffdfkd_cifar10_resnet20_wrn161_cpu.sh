#!/usr/bin/env bash
# DiffDFKD, ICME 2025 (arXiv 2504.00870).
# cifar10, resnet20 -> wrn16_1 on a CPU.
# Settings: 4,000 student steps on 2,000 images drawn by natural_32 under the teacher's guidance.
# Needs one CPU core and checkpoints/pretrained/cifar10_resnet20.pth. Not measured yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method diffdfkd --dataset cifar10 --teacher resnet20 \
  --student wrn16_1 --diffusion_model natural_32 --scheduler ancestral --bn 0.3 --guidance_max_step 2 --lca_every 0 \
  --images_per_class 200 --diffusion_batch_size 50 --epochs 10 --kd_steps 400 --batch_size 256 --warmup_epochs 1 \
  --save_dir checkpoints/diffdfkd/cifar10_resnet20_wrn16_1_cpu "$@"
