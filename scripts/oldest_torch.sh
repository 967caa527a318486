#!/usr/bin/env bash
# Make an environment with the oldest torch that is claimed (dsv3_megatron/arguments/requirements.py), and print its Python.
# It lies beside the given Python's environment, is kept, and takes all else from there: one wheel of torch, its Triton.
set -euo pipefail
python=$(realpath -s "$1")
torch=${2:?version of torch}
triton=${3:?version of triton}

home=$(realpath "$(dirname "$python")/..")
venv=$home-torch-$torch
if [[ ! -e $venv/.installed ]]; then
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -m pip install --quiet --no-deps --target "$site" "torch==$torch.*" "triton==$triton.*" >&2
    # Last on the path: everything else, its NVIDIA libraries among it (2.11 and the newest torch both want CUDA 13).
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/zz_all_else.pth"
    touch "$venv/.installed"
fi
echo "$venv/bin/python"
