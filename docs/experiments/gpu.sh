#!/usr/bin/env bash
# Measures what docs/performance.md says of one GPU, in one call of at most eight minutes.
#
#   bash docs/experiments/gpu.sh OUT                  # writes OUT/gpu.json, OUT/gpu.md and OUT/gpu.log
#   SIZE=toy bash docs/experiments/gpu.sh OUT         # the same parts at toy size, on a CPU
#   ONLY="authors_vitl16 tests" bash docs/experiments/gpu.sh OUT       # adds these parts to OUT
#
# Environment, all optional:
#   SIZE      full or toy
#   BUDGET    seconds for everything; parts that do not fit any more are left out and named
#   ONLY      names of the parts to run, as they stand in gpu.json
#   DINOV3    a checkout of github.com/facebookresearch/dinov3; without it those parts are left out
#   PACKAGES  a folder of Python packages, used where the interpreter does not have them
#   PYTHON    the interpreter
set -euo pipefail
out=$(realpath -m "${1:?usage: [SIZE=toy] bash docs/experiments/gpu.sh OUT}")
options=(--size "${SIZE:-full}" --budget "${BUDGET:-470}")
[ -z "${DINOV3:-}" ] || options+=(--dinov3 "$(realpath "$DINOV3")")
[ -z "${PACKAGES:-}" ] || options+=(--packages "$(realpath "$PACKAGES")")
[ -z "${ONLY:-}" ] || read -ra names <<<"$ONLY"
[ -z "${ONLY:-}" ] || options+=(--only "${names[@]}")
cd "$(dirname "$0")/../.."
exec env PYTHONUNBUFFERED=1 "${PYTHON:-python3}" docs/experiments/gpu.py "$out" "${options[@]}"
