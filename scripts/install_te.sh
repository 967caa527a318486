#!/usr/bin/env bash
# Install Transformer Engine into the environment of the given Python, building its torch extension against the CUDA
# headers and libraries that the nvidia-* wheels of torch brought along: no CUDA toolkit and no GPU needed.
set -euo pipefail
python=$1

if "$python" -c 'import importlib.metadata as m; m.version("transformer-engine-torch")' 2>/dev/null; then
    exit 0
fi
# Headers that torch itself does not need at run time (crt/, cuda/std), of the same CUDA version as torch's runtime.
cuda=$("$python" -c 'import torch; print(torch.version.cuda)')
"$python" -m pip install --quiet ninja pybind11 "nvidia-cuda-crt==$cuda.*" "nvidia-cuda-cccl==$cuda.*"

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Not cccl's inner folder: its headers are named from `cccl` itself.
includes=$(find "$site/nvidia" \( -name include -o -name cccl \) -type d -not -path '*/cccl/*' | paste -sd:)
libs=$(find "$site/nvidia" -type d -name lib | paste -sd:)
cuda_home=$(dirname "$(find "$site/nvidia" -path '*/include/cuda_runtime.h' | head -1)")/..
echo "building Transformer Engine's torch extension (about 12 minutes on two cores; pip keeps the wheel)"
export CPLUS_INCLUDE_PATH="$includes" LIBRARY_PATH="$libs" LD_LIBRARY_PATH="$libs:${LD_LIBRARY_PATH:-}"
export CUDA_HOME="${CUDA_HOME:-$cuda_home}" NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS:-2}"
"$python" -m pip install --no-build-isolation 'transformer-engine[pytorch]>=2.8'
