#!/usr/bin/env bash
# Fills the folder `pack` (which git ignores) with what a bare GPU machine lacks for gpu.sh: wheels,
# compiled kernels and the recordings of the released model. Copy it together with the tree.
#
#   benchmarks/pack.sh [PYTHON_VERSION]      of the GPU machine, 3.12 by default
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12}
python=python3
[[ -x .venv/bin/python ]] && python=$PWD/.venv/bin/python
limit_mib=60

# Not av: nothing that is measured reads or writes files of sound or film.
rm -rf pack/wheels
platforms=()
for n in 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${n}_x86_64"); done
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "$version" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
  --dest pack/wheels "scipy-openblas32>=0.3.29,<0.4" "soxr>=0.5,<2" "ftfy>=6.2,<7" wcwidth \
  "cachetools>=5.5,<8" "setuptools>=77,<82"

"$python" -m triton_kernels.compile --arch sm_90a --out pack/kernels

golden=../shared/golden
if [[ -d $golden ]]; then
  rm -rf pack/golden
  mkdir -p pack/golden
  cp -r "$golden/dit" "$golden/vae" pack/golden/
  # Those that no test on a GPU reads.
  rm -f pack/golden/dit/outputs_{audio_cfg,mean,sp2}.safetensors
else
  echo "no recordings in $golden: nothing can be compared with the released model"
fi

tree=$(git ls-files --cached --others --exclude-standard -z | xargs -0 du --apparent-size -cB1 |
  tail -1 | cut -f1)
pack=$(du --apparent-size -sB1 pack | cut -f1)
du --apparent-size -sh pack/*
total=$(((tree + pack + 1048575) / 1048576))
echo "tree and pack: $total MiB of at most $limit_mib"
((total <= limit_mib))
