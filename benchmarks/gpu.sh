#!/usr/bin/env bash
# GPU evidence from a bare machine: one Hopper GPU, CUDA 13, PyTorch and Triton, no network.
#
#   benchmarks/gpu.sh OUT [WHEELS]
#
# Builds the engine and its kernels, runs the GPU tests, times attention at the real shapes. Everything
# that is printed also goes to OUT. Python packages that the machine lacks are taken from the folder
# WHEELS (`pip download` fills one). Nothing here waits for a network.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [WHEELS]}
wheels=${2:-wheels}
mkdir -p "$out"

{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu \
    --format=csv
  git describe --always --dirty=+ 2>/dev/null || true
} | tee "$out/machine.txt"

for package in scipy_openblas32 pybind11 safetensors transformers soxr av rich pytest; do
  python3 -c "import $package" 2>/dev/null ||
    python3 -m pip install --quiet --no-index --find-links "$wheels" "${package//_/-}"
done
python3 -m pip install --quiet --no-build-isolation --no-deps --editable . 2>&1 | tee "$out/build.txt"
python3 -m triton_kernels.compile --arch sm_90a --out engine/liveact/gpu | tee "$out/kernels.txt"
liveact doctor | tee "$out/doctor.txt"

status=0
python3 -m pytest -m gpu 2>&1 | tee "$out/tests.txt" || status=$?
PYTHONPATH=. python3 tests/kernels/attention/attention_gpu.py 2>&1 | tee "$out/attention.txt" || status=$?
exit "$status"
