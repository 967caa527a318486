#!/usr/bin/env bash
# Make an environment with the oldest torch that is claimed (dsv3_megatron/arguments/requirements.py), and print its Python.
# It lies beside the given Python's environment, is kept, and takes all else from there: one wheel of torch, its Triton.
set -euo pipefail
python=$(realpath -s "$1")
torch=${2:?version of torch}
triton=${3:?version of triton}

home=$(realpath "$(dirname "$python")/..")
venv=$home-torch-$torch
packages() { realpath "$("$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; }

if [[ ! -e $venv/.installed ]]; then
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip install --quiet --no-deps --target "$(packages "$venv/bin/python")" \
        "torch==$torch.*" "triton==$triton.*" >&2
    touch "$venv/.installed"
fi
# Last on the path: everything else, its NVIDIA libraries among it (2.11 and the newest torch both want CUDA 13).
# By its real path: a clone's .venv may be a link into a cache, and the kept environment outlives the clone. Each time:
# so that one that was made by another path is mended.
packages "$python" > "$(packages "$venv/bin/python")/zz_all_else.pth"
echo "$venv/bin/python"
