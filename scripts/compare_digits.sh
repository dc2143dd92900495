#!/usr/bin/env bash
# Compares every method on real handwritten digits, resnet20 -> resnet8, three seeds, 300 student steps each. This is the first
# table of docs/results.md.
#   bash scripts/compare_digits.sh                                    about an hour on two CPU cores; run it again to resume
#   METHODS="zskt csd" SEEDS="0" bash scripts/compare_digits.sh       some methods and seeds
#   OUT=checkpoints/compare_bf16 bash scripts/compare_digits.sh --amp bf16      with further flags of datafree_kd.py
# The weights of losses are the published ones, except --oh 5 for methods with few images. The rotation head of csd and dda needs
# about a hundred student steps per round to learn, so these methods have 3 rounds and the others 12.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
out="${OUT:-checkpoints/compare_digits}"
declare -A flags=(
  [kd]="" [noise]=""
  [dafl]="--kd_steps 5 --g_steps 2 --synthesis_batch_size 128"
  [zskt]="--kd_steps 5 --g_steps 2 --synthesis_batch_size 128"
  [dfad]="--kd_steps 5 --g_steps 2 --synthesis_batch_size 128"
  [dfq]="--kd_steps 5 --g_steps 2 --synthesis_batch_size 128"
  [deepinv]="--g_steps 60 --synthesis_batch_size 100"
  [adi]="--g_steps 60 --synthesis_batch_size 100"
  [cmi]="--init_rounds 6 --init_g_steps 60 --g_steps 20 --synthesis_batch_size 100 --oh 5 --lr_g 2e-3 --memory_size 2048 --negatives 512"
  [fast]="--init_rounds 10 --lr .1 --synthesis_batch_size 100"
  [nayer]="--init_rounds 4 --init_g_loops 2 --g_loops 1 --lr .1 --synthesis_batch_size 100 --nz 256"
  [csd]="--epochs 3 --kd_steps 100 --ep_steps 100 --init_rounds 6 --init_g_steps 60 --g_steps 20 --synthesis_batch_size 100 --oh 5 --lr_g 2e-3"
  [dda]="--epochs 3 --kd_steps 100 --ep_steps 100 --init_bank $out/csd/seed{seed} --g_steps 20 --synthesis_batch_size 100 --oh 5 --lr_g 2e-3 --variants 2 --strength .6
    --fit_passes 21 --fit_lr 4e-3"
  [diffdfkd]="--images_per_class 60 --num_inference_steps 10 --bn .03 --lr .1 --warmup_epochs 0 --weight_decay 1e-4"
)
order="kd noise dafl zskt dfad dfq deepinv adi cmi fast nayer csd dda diffdfkd"
require_known "${METHODS:-}" "$order"
for seed in ${SEEDS:-0 1 2}; do
  teacher=(--dataset digits --seed "$seed")
  python train_scratch.py --model resnet20 "${teacher[@]}" --epochs 30 --amp no --save_dir "$out/teacher/seed$seed" --output "$out/teacher/seed$seed/teacher.pth"
  for method in ${METHODS:-$order}; do
    python datafree_kd.py --method "$method" --dataset digits --teacher resnet20 --teacher_ckpt "$out/teacher/seed$seed/teacher.pth" \
      --student resnet8 --amp no --batch_size 128 --epochs 12 --ep_steps 25 --kd_steps 25 ${flags[$method]} \
      --save_dir "$out/$method/seed{seed}" --seeds "$seed" "$@"
  done
done
python -m engine.report "$out" --budget 100 --target 95
