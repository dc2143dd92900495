#!/usr/bin/env bash
# Quantizes a teacher to int8 after training, calibrated on noise, on an inverted image bank and on real images. This is the table
# of docs/int8.md, which it rewrites, with its lines in checkpoints/results/int8.jsonl. Run the same command again to resume.
#   bash scripts/int8_demo.sh                                                     a teacher of digits, trained first
#   CIFAR_TEACHER=resnet20.pth DATA_ROOT=data bash scripts/int8_demo.sh           also a CIFAR-10 resnet20, with CIFAR-10 in DATA_ROOT
# Further variables:
#   CIFAR_FLAGS="--teacher_std .2470,.2435,.2616"                                 if that teacher's normalization is not the usual one
#   ROUNDS=6 IMAGES=50 STEPS=25 TEST_IMAGES=1000                                  smaller banks, and fewer images for the test
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
out="${OUT:-checkpoints/int8_demo}"
lines="${LINES_FILE:-checkpoints/results/int8.jsonl}"

demo() { # dataset, then the flags of its teacher
  python datafree_kd.py --method csd --dataset "$@" --student resnet8 --stages synthesize --init_rounds "${ROUNDS:-10}" \
    --init_batch_size "${IMAGES:-100}" --init_g_steps "${STEPS:-100}" --lr_g "${LR_G:-2e-3}" --oh 5 --save_dir "$out/$1"
  python -m datafree.int8 --dataset "$@" --bank "$out/$1" --lines "$lines" --into "${INTO:-docs/int8.md}" ${TEST_IMAGES:+--test_images "$TEST_IMAGES"}
}

python train_scratch.py --model resnet20 --dataset digits --epochs 30 --save_dir "$out/teacher" --output "$out/teacher.pth"
demo digits --teacher resnet20 --teacher_ckpt "$out/teacher.pth"
root="${DATA_ROOT:-data}"
if [ -z "${CIFAR_TEACHER:-}" ]; then
  echo "CIFAR-10 skipped: set CIFAR_TEACHER to the weights of a resnet20"
elif ! compgen -G "$root/cifar10.npz" > /dev/null && ! compgen -G "$root/cifar-10*" > /dev/null; then
  echo "CIFAR-10 skipped: $root contains neither cifar10.npz nor cifar-10-*; set DATA_ROOT to the folder of CIFAR-10"
else
  demo cifar10 --data_root "$root" --teacher resnet20 --teacher_ckpt "$CIFAR_TEACHER" ${CIFAR_FLAGS:-}
fi
