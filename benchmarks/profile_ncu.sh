#!/usr/bin/env bash
# Nsight Compute on the kernels of one layer: what limits each.
#
#   benchmarks/profile_ncu.sh OUT [RANGE] [OPTIONS of `python -m benchmarks profile`]
#
# RANGE is a path of NVTX ranges (docs/profiling.md has their names); by default one layer of step 1
# of block 1, the last block that runs op by op, with the shapes of every later one. Writes
# OUT/layer.ncu-rep and a table. Every kernel is run many times over: no time here is that of a
# session, and nothing overlaps.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/profile_ncu.sh OUT [RANGE] [OPTIONS]}
range=${2:-liveact@block 1/step 1/layer 12/}
shift "$(($# < 2 ? $# : 2))"
python=${PYTHON:-python3}
command -v ncu >/dev/null || { echo "expected ncu (Nsight Compute) on the PATH, found none" >&2; exit 2; }
mkdir -p "$out"

ncu --profile-from-start off --nvtx --nvtx-include "$range" --graph-profiling node --set full \
  --clock-control base --cache-control all --force-overwrite --export "$out/layer" \
  "$python" -m benchmarks profile --repeat 1 --blocks 0-1 --json "$out/run.json" "$@"
ncu --import "$out/layer.ncu-rep" --csv --page raw >"$out/layer.csv"
ncu --import "$out/layer.ncu-rep" --print-summary per-kernel
