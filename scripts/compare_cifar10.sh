#!/usr/bin/env bash
# Every method on CIFAR-10 with the same four CPU minutes for images and student, resnet20 -> wrn16_1: a table of docs/results.md.
#   TEACHER=cifar10_resnet20.pth DATA=data PICTURES=folder bash scripts/compare_cifar10.sh      an hour on one CPU core
# The teacher is RepDistiller's public resnet20, whose normalization has a std of its own. PICTURES: unrelated images, to any
# depth. Loss weights are the published ones; lengths were set by the rates measured on one thread.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
out="${OUT:-checkpoints/compare_cifar10}"
export OMP_NUM_THREADS=1
stream="--kd_steps 5 --synthesis_batch_size 128"
bank="--synthesis_batch_size 100 --ep_steps 60"
declare -A flags=(
  [kd]="--ep_steps 145 --kd_steps 145" [noise]="--ep_steps 145 --kd_steps 145"
  [pictures]="--images ${PICTURES:-pictures} --ep_steps 145 --kd_steps 145"
  [dafl]="$stream --ep_steps 70" [zskt]="$stream --ep_steps 65" [dfad]="$stream --ep_steps 65" [dfq]="$stream --ep_steps 65"
  [deepinv]="$bank --kd_steps 30 --g_steps 85"
  [adi]="$bank --kd_steps 30 --g_steps 50"
  [cmi]="$bank --kd_steps 60 --init_rounds 3 --init_g_steps 15 --g_steps 15 --lr_g 4e-3"
  [fast]="$bank --kd_steps 30 --init_rounds 4 --lr .1"
  [nayer]="$bank --kd_steps 60 --init_rounds 1 --init_g_loops 1 --g_loops 1 --lr .1"
  [csd]="$bank --kd_steps 60 --init_rounds 3 --init_batch_size 100 --init_g_steps 20 --g_steps 10 --lr_g 4e-3 --head_interval 4"
  [dda]="--synthesis_batch_size 100 --kd_steps 50 --ep_steps 50 --init_bank $out/csd --g_steps 7 --lr_g 4e-3 --head_interval 4
    --fit_passes 16 --fit_lr 4e-3"
)
for name in ${METHODS:-kd noise pictures dafl zskt dfad dfq deepinv adi cmi fast nayer csd dda}; do
  python datafree_kd.py --method "${name/pictures/noise}" --dataset cifar10 --data_root "${DATA:-data}" \
    --teacher resnet20 --teacher_ckpt "${TEACHER:-cifar10_resnet20.pth}" --teacher_mean .4914,.4822,.4465 --teacher_std .2470,.2435,.2616 \
    --student wrn16_1 --amp no --batch_size 128 --epochs 3 ${flags[$name]} --save_dir "$out/$name"
done
python -m engine.report "$out" --folders
