#!/usr/bin/env bash
# Nsight Systems on some blocks of a session: what ran when, on which stream, under which range.
#
#   benchmarks/profile_nsys.sh OUT [A-B] [OPTIONS of `python -m benchmarks profile`]
#
# Writes OUT/blocks.nsys-rep (open it in the GUI; docs/profiling.md walks through one) and tables of
# kernels and ranges. Runs the same sessions without Nsight too: both JSON files say how long a
# block took and how much of the decoding passed under denoising.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/profile_nsys.sh OUT [A-B] [OPTIONS]}
blocks=${2:-5-6}
shift "$(($# < 2 ? $# : 2))"
python=${PYTHON:-python3}
command -v nsys >/dev/null || { echo "expected nsys (Nsight Systems) on the PATH, found none" >&2; exit 2; }
mkdir -p "$out"

"$python" -m benchmarks profile --repeat 1 --json "$out/without.json" "$@"
# graph-trace=node: every kernel of a CUDA graph, not one bar for the graph. Its cost is why the
# times to quote are those of without.json.
nsys profile --trace=cuda,nvtx,osrt --cuda-graph-trace=node --sample=none --cpuctxsw=none \
  --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true \
  --output="$out/blocks" \
  "$python" -m benchmarks profile --repeat 1 --blocks "$blocks" --json "$out/with.json" "$@"
nsys stats --force-export=true --report cuda_gpu_kern_sum,nvtx_gpu_proj_sum,cuda_gpu_mem_time_sum \
  --format csv --output "$out/blocks" "$out/blocks.nsys-rep"
"$python" - "$out" <<'PYTHON'
import json, sys
for name in ("without", "with"):
    run = json.load(open(f"{sys.argv[1]}/{name}.json"))["off"]
    period, overlap = run["block_period_ms"]["median"], run["overlap"]
    print(f"{name} Nsight: {period:.1f} ms per block, {overlap:.0%} of the decoding under denoising")
PYTHON
