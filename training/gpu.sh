#!/bin/bash
# Trains a talker on a GPU within ten minutes: training/gpu.sh OUT DATA [SECONDS [DEVICE]]
#
# DATA has clips.npz and held.npz, made beforehand, on CPU cores and with flite:
#   python -m training --work DATA data --clips 4000 --flite 0.6
# OUT gets the logs and curves of every stage, and OUT/checkpoint. SECONDS (480) are spread over the
# stages that learn; loading and encoding come on top. DEVICE (cuda) may be cpu, to see that it runs.
# It has not run on a GPU yet.
set -euo pipefail

usage="usage: training/gpu.sh OUT DATA [SECONDS [DEVICE]]"
out=$(realpath -m "${1:?$usage}")
data=$(realpath "${2:?$usage}")
seconds=${3:-480}
device=${4:-cuda}
cd "$(dirname "$0")/.."
mkdir -p "$out"
cp "$data/clips.npz" "$data/held.npz" "$out/"

stage() { # name, arguments
    local begin=$SECONDS
    python -m training --work "$out" --device "$device" "$@" >"$out/$1.txt" 2>&1 ||
        { echo "$1 failed, see $out/$1.txt"; tail -n 3 "$out/$1.txt"; exit 1; }
    echo "$1: $((SECONDS - begin)) s"
}
minutes() { # percent of the time
    awk -v s="$seconds" -v p="$1" "BEGIN { print s * p / 6000 }"
}
stage vae --steps 3000 --minutes "$(minutes 40)"
stage speech --steps 6000 --minutes "$(minutes 15)"
stage encode --clips 1500
stage dit --batch 16 --steps 4000 --minutes "$(minutes 45)"
echo "checkpoint: $out/checkpoint"
