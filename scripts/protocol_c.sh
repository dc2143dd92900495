#!/usr/bin/env bash
# Protocol C: every method and control on CIFAR-10, resnet20 -> wrn16_1, 4,000 student steps of 256 images. Settings are published,
# --scale sets all lengths, and synthesis is capped at the student's CPU time. This is a table of docs/results.md.
#   TEACHER=cifar10_resnet20.pth DATA_ROOT=data bash scripts/protocol_c.sh     all methods; run it again to resume
#   bash scripts/protocol_c.sh --jobs 8 fast csd                               some methods, eight runs at once (default: one per core)
#   bash scripts/protocol_c.sh --list                                          prints the commands that are left to run, and runs none
#   SEEDS="0 1" EXTRA="--compile no" bash scripts/protocol_c.sh                other seeds, further flags of datafree_kd.py
# TEACHER: a resnet20 whose normalization has a std of its own (docs/reference.md, Networks). IMAGE: the picture for one_image.
# PICTURES: unrelated images. A run with a result.json is skipped, and a stopped run is resumed. Each run has one CPU thread, and
# uses bf16 where it is faster (AMP=bf16: everywhere, as in the table). This command keeps the results, at the end or at any time:
#   python -m engine.report checkpoints/protocol_c --lines checkpoints/results/protocol_c.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
export OMP_NUM_THREADS=1
out="${OUT:-checkpoints/protocol_c}" data="${DATA_ROOT:-data}" jobs="$(nproc)" list=
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --jobs)
      if [[ ! "${2:-}" =~ ^[1-9][0-9]*$ ]]; then echo "error: --jobs '${2:-}' found, a whole number from 1 on wanted" >&2; exit 2; fi
      jobs="$2"; shift 2 ;;
    --list) list=yes; shift ;;
    *) echo "error: $1 found, --jobs N, --list or names of methods wanted" >&2; exit 2 ;;
  esac
done
teacher="${TEACHER:-cifar10_resnet20.pth}"
if [ -z "$list" ] && [ ! -e "$teacher" ]; then
  echo "error: the teacher $teacher does not exist; give its path with TEACHER=... (docs/reference.md, Networks)" >&2
  exit 2
fi
image="${IMAGE:-$(python -c 'import sklearn.datasets as d; print(d.__path__[0] + "/images/china.jpg")')}"

# The scale is 4,000 / published student steps. An epoch has whole rounds, so dafl, zskt, dfad and dfq get 3,960 steps. A line with
# further lengths is capped: with the scale alone, synthesis would take x times the student's CPU time (measured: docs/results.md).
# The cap divides the steps and the images of synthesis by sqrt(x) each. The images are divided through the rounds of the initial
# bank, or through the images per round for a method without one.
declare -A flags=(
  [kd]="--scale .05"
  [noise]="--scale .05"
  [noise_batch]="--scale .05 --bn_mode batch"
  [one_image]="--scale .05 --image $image"
  [pictures]="--scale .05 --images ${PICTURES:-$data/cifar100.npz}"
  [dafl]="--scale .049" [zskt]="--scale .049" [dfad]="--scale .049" [dfq]="--scale .049"
  [fast]="--scale .05"
  [nayer]="--scale .0333 --g_steps 13 --synthesis_batch_size 171"                  # x 5.5
  [deepinv]="--scale .05 --g_steps 145 --synthesis_batch_size 166"                 # x 2.4
  [adi]="--scale .05 --g_steps 110 --synthesis_batch_size 126"                     # x 4.1
  [cmi]="--scale .02 --init_rounds 23 --init_g_steps 29 --g_steps 29"              # x 4.7
  [csd]="--scale .02 --init_rounds 52 --init_g_steps 65 --g_steps 26"              # x 1.2
  [dda]="--scale .01"
  [diffdfkd]="--scale .0833 --diffusion_model natural_32 --images_per_class 744 --num_inference_steps 10"   # x 3.8
)
order="kd noise noise_batch one_image pictures fast nayer csd dda cmi adi deepinv dfq zskt dafl dfad diffdfkd"
often=" kd fast nayer csd dda "  # with three seeds
require_known "$*" "$order"
names="${*:-$order}" failed= started=()
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM  # without it, the runs would continue after Ctrl-C
for seed in ${SEEDS:-0 1 2}; do
  for name in $names; do
    if [ -z "${SEEDS:-}" ] && [ "$seed" != 0 ] && [[ "$often" != *" $name "* ]]; then continue; fi
    run="$out/$name/seed$seed"
    if [ -e "$run/result.json" ]; then continue; fi
    method="${name/noise_batch/noise}"
    command=(python datafree_kd.py --method "${method/pictures/noise}" ${flags[$name]} --dataset cifar10 --data_root "$data" --teacher resnet20
      --teacher_ckpt "$teacher" --teacher_mean .4914,.4822,.4465 --teacher_std .2470,.2435,.2616
      --student wrn16_1 --batch_size 256 --amp "${AMP:-auto}" --seed "$seed" --save_dir "$run" ${EXTRA:-})
    if [ -n "$list" ]; then echo "${command[*]}"; continue; fi
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || failed=yes; done
    mkdir -p "$out/console"
    echo "$(date +%H:%M:%S) $name, seed $seed: output in $out/console/${name}_seed$seed.txt"
    "${command[@]}" >"$out/console/${name}_seed$seed.txt" 2>&1 &
    started+=("$name/seed$seed")
  done
done
if [ -n "$list" ]; then exit; fi
while [ -n "$(jobs -p)" ]; do wait -n || failed=yes; jobs >/dev/null; done
if [ -n "$failed" ]; then
  for run in "${started[@]}"; do
    if [ ! -e "$out/$run/result.json" ]; then echo "$run: $(tail -n 1 "$out/console/${run/\//_}.txt")" >&2; fi
  done
  echo "error: these runs failed; see $out/console/*.txt, then run the same command again" >&2
  exit 1
fi
python -m engine.report "$out" --folders
