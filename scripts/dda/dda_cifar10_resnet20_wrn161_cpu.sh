#!/usr/bin/env bash
# DDA, ACM MM 2024 (arXiv 2410.17606).
# cifar10, resnet20 -> wrn16_1 on a CPU.
# Settings: 4,000 student steps; variants by natural_32 under the teacher's guidance.
# Needs one CPU core and checkpoints/pretrained/cifar10_resnet20.pth. Not measured yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dda --dataset cifar10 --teacher resnet20 \
  --student wrn16_1 --prior natural --strength 0.6 --guidance_oh 1 --guidance_bn 0.3 --guidance_max_step 2 --agree \
  --epochs 10 --kd_steps 400 --batch_size 256 --init_rounds 20 --init_g_steps 100 \
  --lr_g 4e-3 --g_steps 40 \
  --save_dir checkpoints/dda/cifar10_resnet20_wrn16_1_cpu "$@"
