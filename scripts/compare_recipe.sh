#!/usr/bin/env bash
# Measures the effect of --recipe fast at equal CPU time, and of --views K and bf16 at equal steps, on CIFAR-10, resnet20 -> wrn16_1.
# These are tables of docs/speed.md.
#   TEACHER=cifar10_resnet20.pth BANK=checkpoints/protocol_c/nayer/seed0 DATA_ROOT=data bash scripts/compare_recipe.sh
#   RUNS="kd_plain kd_fast" SEEDS="0 1 2" bash scripts/compare_recipe.sh     some runs and seeds; run it again to resume
# Recipes: each run has 2.5 CPU-minutes of student and teacher (times LENGTH, a whole number), at 1.23 and .53 ms per image. Views and float32:
# 1,000 steps of 128. kd learns from the real images, bank from the images of a finished run, which makes no new ones.
# TEACHER: see docs/reference.md, Networks.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
data="${DATA_ROOT:-data}" out="${OUT:-checkpoints/compare_recipe}" length="${LENGTH:-1}"
bank="--method noise --images $out/images"
plain="--batch_size 256 --lr .2 --weight_decay 5e-4 --epochs 1 --kd_steps $((333 * length))"
fast="--recipe fast --epochs 1 --kd_steps $((650 * length))"
views="$bank --recipe fast --epochs 1 --kd_steps 1000"
declare -A flags=(
  [kd_plain]="--method kd $plain"
  [kd_fast]="--method kd $fast"
  [bank_plain]="$bank $plain"
  [bank_fast]="$bank $fast"
  [views_all]="$views"
  [float32]="$views --amp no"
)
for few in 4 8 16 32; do flags[views_$few]="$views --views $few"; done
order="kd_plain kd_fast bank_plain bank_fast views_4 views_8 views_16 views_32 views_all float32"
require_known "${RUNS:-}" "$order"
names="${RUNS:-$order}"
if [[ "$names" =~ bank|views|float32 ]] && [ ! -e "$out/images" ]; then
  source_run="${BANK:-checkpoints/protocol_c/nayer/seed0}"
  if [ ! -e "$source_run/bank" ]; then
    echo "error: $source_run has no image bank; make it with 'bash scripts/protocol_c.sh nayer', or name another run with BANK=..." >&2
    exit 2
  fi
  python -m datafree.bank export "$source_run" "$out/images"
fi
for run in $names; do
  for seed in ${SEEDS:-0}; do
    python datafree_kd.py ${flags[$run]} --dataset cifar10 --data_root "$data" --teacher resnet20 --teacher_ckpt "${TEACHER:-cifar10_resnet20.pth}" \
      --teacher_std .2470,.2435,.2616 --student wrn16_1 --seed "$seed" --save_dir "$out/$run/seed{seed}" "$@"
  done
done
python -m engine.report "$out" --folders
