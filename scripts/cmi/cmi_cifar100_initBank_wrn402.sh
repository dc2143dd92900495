#!/usr/bin/env bash
# CMI, IJCAI 2021 (arXiv 2105.08584).
# cifar100, initial image bank of wrn40_2 (51,200 images).
# Settings: none are published for the initial bank; loss weights as in CMI's script, 500 steps per image as in CSD's.
# Needs one GPU and checkpoints/pretrained/cifar100_wrn40_2.pth.
# Makes checkpoints/cmi/cifar100_wrn40_2_initBank/bank.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method cmi --dataset cifar100 --teacher wrn40_2 \
  --stages synthesize --save_dir checkpoints/cmi/cifar100_wrn40_2_initBank \
  --init_rounds 200 --synthesis_batch_size 256 --oh 0.5 --cr_T 0.1 "$@"
