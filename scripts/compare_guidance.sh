#!/usr/bin/env bash
# Measures the effect of each part of DiffDFKD's guidance, on digits with the prior of printed digits, three seeds. This is a
# table of docs/results.md.
#   bash scripts/compare_guidance.sh        half an hour on a CPU core; needs the teachers of scripts/compare_digits.sh
#   RUNS="unguided oh" SEEDS=0 bash scripts/compare_guidance.sh        some runs and seeds
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
out="${OUT:-checkpoints/compare_guidance}"
teachers="${TEACHERS:-checkpoints/compare_digits/teacher}"
declare -A flags=(
  [unguided]="--oh 0 --bn 0 --lca_every 0"
  [unguided_scale1]="--oh 0 --bn 0 --lca_every 0 --guidance_scale 1"
  [unguided_lca]="--oh 0 --bn 0"
  [oh]="--bn 0 --lca_every 0"
  [oh_bn]="--bn .03 --lca_every 0"
  [oh_bn_decoder]="--bn .03 --lca_every 0 --guidance_backprop decoder"
  [oh_bn_adv]="--bn .03 --adv 1 --adv_from 20 --adv_steps 60 --lca_every 0"
  [oh_bn_lca]="--bn .03"
  [oh_bn_adv_lca]="--bn .03 --adv 1 --adv_from 20 --adv_steps 60"
  [oh_bn_adv_lca_scale1]="--bn .03 --adv 1 --adv_from 20 --adv_steps 60 --guidance_scale 1"
)
order="unguided unguided_scale1 unguided_lca oh oh_bn oh_bn_decoder oh_bn_adv oh_bn_lca oh_bn_adv_lca oh_bn_adv_lca_scale1"
require_known "${RUNS:-}" "$order"
for name in ${RUNS:-$order}; do
  python datafree_kd.py --method diffdfkd --dataset digits --teacher resnet20 --teacher_ckpt "$teachers/seed{seed}/teacher.pth" \
    --student resnet8 --amp no --batch_size 128 --epochs 6 --kd_steps 50 --lr .1 --warmup_epochs 0 --weight_decay 1e-4 \
    --images_per_class 40 --num_inference_steps 10 ${flags[$name]} --save_dir "$out/$name" --seeds "${SEEDS:-0,1,2}"
done
python -m engine.report "$out" --folders
