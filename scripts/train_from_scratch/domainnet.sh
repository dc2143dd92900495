#!/usr/bin/env bash
# DiffDFKD, ICME 2025 (arXiv 2504.00870): trains the teacher, resnet34 at 224 px on ten classes of one domain of DomainNet.
# Accuracy of the authors' own teachers: sketch 57.79 %, quickdraw 88.93 %.
# Needs one GPU and data/domainnet/{sketch_train.txt,sketch_test.txt,sketch/...}.
# DOMAIN=quickdraw bash ... uses another domain than sketch.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python train_scratch.py --model resnet34_imagenet --dataset domainnet --domain "${DOMAIN:-sketch}" \
  --epochs 120 --batch_size 64 --lr 0.01 --weight_decay 2e-4 "$@"
