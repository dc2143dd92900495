#!/usr/bin/env bash
# The complete workflow on real handwritten digits, from a bare clone: minutes on two CPU cores, downloads only Python packages.
#   bash scripts/quickstart.sh              seed 0
#   bash scripts/quickstart.sh diffdfkd     only DiffDFKD, with the diffusion prior of printed digits that the clone contains
#   SEED=1 bash scripts/quickstart.sh       another seed
# Run the same command again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
part="${1:-all}"
if [[ "$part" != all && "$part" != diffdfkd || $# -gt 1 ]]; then echo "error: '$*' found, nothing or diffdfkd wanted" >&2; exit 2; fi
source scripts/environment.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # for such small networks more threads are slower
seed="${SEED:-0}"
out="${OUT:-checkpoints/quickstart}/seed$seed"
task=(--dataset digits --seed "$seed")
kd=("${task[@]}" --teacher resnet20 --teacher_ckpt "$out/teacher.pth" --student resnet8 --recipe fast --epochs 5 --kd_steps 24)

echo "== 1/5  teacher: resnet20 on 1195 real digits"
python train_scratch.py --model resnet20 "${task[@]}" --epochs 30 --save_dir "$out/teacher" --output "$out/teacher.pth"
if [ "$part" = all ]; then
  echo "== 2/5  for comparison: resnet8, the student, on the same real digits, with as many steps as below"
  python train_scratch.py --model resnet8 "${task[@]}" --epochs 13 --save_dir "$out/real" --output "$out/real.pth"
  inversion=(--g_steps 20 --synthesis_batch_size 100 --oh 5 --lr_g 2e-3 --warm_generator)
  echo "== 3/5  CSD: an image bank inverted from the teacher, and a student trained on it without real digits"
  python datafree_kd.py --method csd "${kd[@]}" "${inversion[@]}" --save_dir "$out/csd" --init_rounds 4 --init_g_steps 20
  echo "== 4/5  DDA: filtered variants of that bank, made by a diffusion model trained on it, and a student trained on both"
  python datafree_kd.py --method dda "${kd[@]}" "${inversion[@]}" --save_dir "$out/dda" --init_bank "$out/csd/bank" \
    --variants 2 --strength 0.6 --fit_passes 21 --fit_lr 4e-3
fi
echo "== 5/5  DiffDFKD: a diffusion model of printed digits draws images under the teacher's guidance, and a student is trained on them"
python datafree_kd.py --method diffdfkd "${kd[@]}" --save_dir "$out/diffdfkd" --images_per_class 60 --num_inference_steps 10 --bn 0.03

echo
python -m engine.report "$out" --rounds
echo
if [ "$part" = all ]; then
  echo "These resnet8 students learned handwritten digits from images that were made with the teacher alone (csd, dda) or with"
  echo "a diffusion model of printed digits (diffdfkd). The rows \"real data\" are the teacher and a resnet8 trained on real images."
else
  echo "This resnet8 student learned handwritten digits from images that a diffusion model of printed digits drew under the"
  echo "teacher's guidance. The row \"real data\" is the teacher, which was trained on real images."
fi
echo
echo "pictures:    $out/*/pictures/*.png"
echo "figures:     $out/*/result.json, metrics.jsonl"
echo "TensorBoard: tensorboard --logdir $out"
