#!/usr/bin/env bash
# distillation on noise, the lower bound; --images FOLDER for unrelated pictures:
# cifar100, resnet34 -> resnet18; steps and rates as the methods'.
# One GPU. Wants checkpoints/pretrained/cifar100_resnet34.pth.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method noise --dataset cifar100 --teacher resnet34 \
  --student resnet18 "$@"
