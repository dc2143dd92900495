#!/usr/bin/env bash
# Runs all tests from a bare clone in minutes, on the CPU, with no network except for Python packages.
#   bash scripts/test.sh -k bank            some of the tests
#   WORKERS=8 bash scripts/test.sh          on a machine with more than two cores
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
# One thread a process: two threads that wait for a busy core can slow a tiny network thirty-fold.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m pytest -q -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=5 tests "$@"
