#!/usr/bin/env bash
# Fast-10, AAAI 2022 (arXiv 2112.06253); Fast-5: --g_steps 5 --lr_g 3e-3; Fast-2: --g_steps 2 --lr_g 5e-3 --lr_z .015.
# cifar100, vgg11 -> resnet18.
# Settings: published.
# The paper's acc1 (best test epoch): 67.44 %.
# Needs one GPU and checkpoints/pretrained/cifar100_vgg11.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method fast --dataset cifar100 --teacher vgg11 \
  --student resnet18 --adv 1.0 --oh 0.5 "$@"
