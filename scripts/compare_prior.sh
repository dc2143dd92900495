#!/usr/bin/env bash
# Measures the effect of a prior of natural images on DDA and DiffDFKD, on CIFAR-10, resnet20 -> wrn16_1. This is a table of
# docs/results.md.
#   TEACHER=cifar10_resnet20.pth DATA_ROOT=data bash scripts/compare_prior.sh     4,000 student steps of 256; run it again to resume
#   SHORT=yes bash scripts/compare_prior.sh                                       1,000 steps of 128 with --recipe fast; bank of 3,000 images, not 5,000
#   RUNS="csd dda_natural_guided" SEEDS="0 1 2" bash scripts/compare_prior.sh     some runs and seeds
# csd and all dda runs of a seed start from one image bank. TEACHER: see docs/reference.md, Networks. The run pictures needs CIFAR-100.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
data="${DATA_ROOT:-data}"
if [ -n "${SHORT:-}" ]; then
  out="${OUT:-checkpoints/compare_prior_short}" lengths="--recipe fast --epochs 10 --kd_steps 100" rounds=15 steps=60 images=300 warmup=
else
  out="${OUT:-checkpoints/compare_prior}" lengths="--batch_size 256 --epochs 10 --kd_steps 400" rounds=25 steps=100 images=500 warmup="--warmup_epochs 1"
fi
inversion="--g_steps 20 --synthesis_batch_size 200"
variants="$inversion --init_bank $out/bank/seed{seed} --variants 2 --strength .6 --diffusion_batch_size 200 --diffusion_dtype bf16"
guided="--guidance_oh 1 --guidance_bn .3 --guidance_max_step 2 --agree"
draw="$warmup --diffusion_model natural_32 --diffusion_dtype bf16 --scheduler ancestral --lca_every 0 --images_per_class $images
  --synthesis_batch_size 500 --diffusion_batch_size 250 --num_inference_steps 20"
declare -A flags=(
  [bank]="--method csd --stages synthesize --init_rounds $rounds --init_g_steps $steps"
  [csd]="--method csd $inversion --init_bank $out/bank/seed{seed}"
  [dda_pixel]="--method dda --prior pixel $variants"
  [dda_pixel_guided]="--method dda --prior pixel $guided $variants"
  [dda_natural]="--method dda --prior natural $variants"
  [dda_natural_labels]="--method dda --prior natural --variant_labels teacher $variants"
  [dda_natural_guided]="--method dda --prior natural $guided $variants"
  [diffdfkd]="--method diffdfkd $draw --oh 1 --bn .3 --guidance_max_step 2"
  [dm_kd]="--method diffdfkd $draw --oh 0 --bn 0 --prior_classes own --guidance_scale 2"
  [pictures]="--method noise --images $data/cifar100.npz"
  [kd]="--method kd"
)
order="csd dda_natural_guided dda_natural dda_natural_labels dda_pixel dda_pixel_guided diffdfkd dm_kd pictures kd"
require_known "${RUNS:-}" "bank $order"
for seed in ${SEEDS:-0}; do
  for run in bank ${RUNS:-$order}; do
    python datafree_kd.py ${flags[$run]} --dataset cifar10 --data_root "$data" --teacher resnet20 --teacher_ckpt "${TEACHER:-cifar10_resnet20.pth}" \
      --teacher_std .2470,.2435,.2616 --student wrn16_1 $lengths --seed "$seed" --save_dir "$out/$run/seed{seed}" "$@"
  done
done
python -m engine.report "$out" --folders
