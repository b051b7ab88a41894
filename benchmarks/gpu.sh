#!/usr/bin/env bash
# GPU evidence from a bare machine in ten minutes: one Hopper GPU, CUDA 13, PyTorch, Triton, no network.
#
#   benchmarks/gpu.sh OUT first|second
#
# `first` needs at most 8 minutes: is it correct, what does a block take, which attention kernel.
# `second` is for another window: plain PyTorch beside it, every kernel beside its peers, the paper's
# tables, the rest of the tests. Each stage has a process and a time limit of its own; what it found
# is one line, and its JSON lies in OUT as soon as it has ended. At the end there are one table and
# one tar, OUT/results.tar.gz, of which `python -m benchmarks report OUT` makes tables and figures.
#
# What the machine lacks comes from the folder `pack`, which benchmarks/pack.sh fills beforehand.
set -euo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT first|second}")
cd "$(dirname "$0")/.."
exec python3 -m benchmarks.stages "$out" "${2:?usage: benchmarks/gpu.sh OUT first|second}"
