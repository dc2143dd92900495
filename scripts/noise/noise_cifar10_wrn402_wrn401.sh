#!/usr/bin/env bash
# distillation on noise, the lower bound; --images FOLDER for unrelated pictures:
# cifar10, wrn40_2 -> wrn40_1; steps and rates as the methods'.
# One GPU. Wants checkpoints/pretrained/cifar10_wrn40_2.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method noise --dataset cifar10 --teacher wrn40_2 \
  --student wrn40_1 "$@"
