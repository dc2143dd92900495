#!/usr/bin/env bash
# DDA, ACM MM 2024 (arXiv 2410.17606).
# tiny_imagenet, wrn40_2 -> wrn16_1.
# Settings: published for CSD; none are published for the diffusion stage, whose prior is trained here.
# Needs one GPU. First: bash scripts/csd/csd_tiny_imagenet_initBank_wrn402.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
python datafree_kd.py --method dda --dataset tiny_imagenet --teacher wrn40_2 \
  --student wrn16_1 --init_bank checkpoints/csd/tiny_imagenet_wrn40_2_initBank/bank "$@"
