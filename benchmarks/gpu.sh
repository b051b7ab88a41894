#!/usr/bin/env bash
# GPU evidence from a bare machine in under 9 minutes: one Hopper GPU, CUDA 13, PyTorch, Triton.
#
#   benchmarks/gpu.sh OUT [WHEELS] [SECONDS]
#
# Builds the engine and its kernels, runs the GPU tests, times every kernel at the real shapes beside
# its peers and one block of the released size (random weights, drawn on the GPU) beside plain
# PyTorch, then the paper's tables, the VAE and a session. Opening a stream tunes its products. JSON,
# figures and everything printed go to OUT. Python packages that the machine lacks come from the
# folder WHEELS (`pip download` fills one); nothing waits for a network. A stage that does not fit
# into what is left of SECONDS (default 525) is cut off or skipped, and the summary says so.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [WHEELS] [SECONDS]}")
wheels=${2:-wheels}
limit_s=${3:-525}
mkdir -p "$out"
: >"$out/summary.txt"

# stage NAME COMMAND...: runs within the time that is left, into OUT/NAME.txt.
stage() {
  local name=$1 left=$((limit_s - SECONDS)) start=$SECONDS status=0
  shift
  if ((left < 10)); then
    echo "$name: skipped, $left s left of $limit_s" | tee -a "$out/summary.txt"
    return 1
  fi
  timeout --signal=INT --kill-after=10 "$left" "$@" >"$out/$name.txt" 2>&1 || status=$?
  ((status == 124 || status == 137)) && echo "cut off after $left s" >>"$out/$name.txt"
  tail -n 60 "$out/$name.txt"
  echo "$name: exit code $status after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  return "$status"
}

install() { # package by package: an optional one may be absent
  local package status=0
  for package in scipy_openblas32 pybind11 cmake ninja safetensors tokenizers transformers soxr av rich \
    pytest; do
    python3 -c "import $package" 2>/dev/null ||
      python3 -m pip install --quiet --no-index --find-links "$wheels" "${package//_/-}" || status=1
  done
  for package in pynvml:nvidia-ml-py matplotlib:matplotlib cudnn:nvidia-cudnn-frontend \
    flash_attn:flash-attn nvidia.nvtx:nvidia-nvtx; do
    python3 -c "import ${package%:*}" 2>/dev/null ||
      python3 -m pip install --quiet --no-index --no-deps --find-links "$wheels" "${package#*:}" ||
      echo "optional: no ${package#*:}"
  done
  return "$status"
}

build() { # the C++ side and the GPU kernels have nothing to do with each other
  python3 -m triton_kernels.compile --arch sm_90a --out engine/liveact/gpu &
  local kernels=$!
  python3 -m pip install --quiet --no-build-isolation --no-deps --editable . || return 1
  wait "$kernels"
}
export wheels
export -f install build

{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu \
    --format=csv
  git describe --always --dirty=+ 2>/dev/null
} | tee "$out/machine.txt"

failed=0
stage install bash -c install || failed=1
stage build bash -c build || exit 1 # nothing below means anything without it
stage doctor python3 -m liveact doctor || failed=1
# The products first: without one of their kinds no stream opens.
stage products env CUBLASLT_LOG_LEVEL=1 python3 -m pytest -m gpu -q -rs tests/gpu/test_gpu_products.py ||
  failed=1
bench=(python3 -m benchmarks)
model=(--device cuda:0 --random-weights released --size 512x512 --precision fp8)
stage kernels "${bench[@]}" kernels --device cuda:0 --repeat 5 --check --json "$out/kernels.json" \
  --plot "$out/roofline.png" || failed=1
stage block "${bench[@]}" block "${model[@]}" --repeat 5 --json "$out/block.json" || failed=1
stage tests python3 -m pytest -m gpu -q -rs -k "not hopper and not two_fp8_kernels" || failed=1
stage paper "${bench[@]}" paper "${model[@]}" --repeat 3 --blocks 20 --json "$out/paper.json" \
  --plot "$out/scaling.png" || failed=1
stage vae "${bench[@]}" vae --device cuda:0 --endurance-blocks 10 --json "$out/vae.json" || failed=1
stage session "${bench[@]}" session "${model[@]}" --minutes 0.3 --json "$out/session.json" || failed=1
# Both kernels of self-attention, of which the engine packages the first (docs/attention.md). Last and
# with a limit of its own: the second has never run, and may hang.
stage hopper timeout --kill-after=5 60 python3 -m pytest -m gpu -q -rs -k "hopper or two_fp8_kernels" || failed=1
stage attention timeout --kill-after=5 60 python3 -m tests.support.kernels.attention_gpu || failed=1
echo
cat "$out/summary.txt"
echo "took $SECONDS s"
exit "$failed"
