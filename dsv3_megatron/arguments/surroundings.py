"""What the checks of arguments have to know about the machine, as data, so that tests can invent machines."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.arguments.requirements import CUDA, CUDNN, TE, TORCH, installed_version, lacking
from dsv3_megatron.errors import RefusedArgument

SUPPORTED_MEGATRON = ("0.19.0", "0.20.0")
OPTIONAL = ("wandb", "nvidia_resiliency_ext")  # packages that single options of Megatron need
MAX_CONNECTIONS, CUDA_DEFAULT_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS", "8"


@dataclass(frozen=True)
class Surroundings:
    """The job and the software around a run.

    Attributes:
        world_size: ranks of the job.
        ranks_per_node: ranks that share a machine.
        on_cpu: the CPU runtime is active.
        has_te: Transformer Engine is installed.
        te_lacks: what the installed Transformer Engine lacks for `--fp8-recipe dsv3`.
        te_fp32_scales: NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 is set.
        has_deepep: DeepEP is installed.
        megatron_version: of megatron-core.
        files_here: the files and folders that options name are to be found on this machine.
        missing: which of `OPTIONAL` are not installed.
        checkpoint: a `checkpoint.start.Start` in place of the one that --load or --pretrained-checkpoint names.
        lacks: keys of `requirements.USES` that the installed packages do not have.
        has_apex: NVIDIA's Apex with its fused weight gradient is installed.
        torch, cuda, cudnn: versions; "" where unknown, of which nothing is said.
        capability: of the GPU, (9, 0) for Hopper.
        max_connections: CUDA_DEVICE_MAX_CONNECTIONS; CUDA's own default is 8.
    """

    world_size: int = 1
    ranks_per_node: int = 8
    on_cpu: bool = False
    has_te: bool = True
    te_lacks: str = ""
    te_fp32_scales: bool = False
    has_deepep: bool = True
    megatron_version: str = SUPPORTED_MEGATRON[0]
    files_here: bool = True
    missing: frozenset[str] = frozenset()
    checkpoint: Any = None
    lacks: frozenset[str] = frozenset()
    has_apex: bool = False
    torch: str = ""
    cuda: str = ""
    cudnn: str = ""
    capability: tuple[int, int] = (9, 0)
    max_connections: int = 32


def detect() -> Surroundings:
    """The surroundings of this process (from torchrun's environment and the installed packages).

    Inside `imagined` they are what was imagined.
    """
    if _imagined is not None:
        return _imagined
    import torch

    from dsv3_megatron import cpu
    from dsv3_megatron.fp8 import te_recipe

    on_cpu = cpu.is_active()
    has_te = is_installed("transformer_engine")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Surroundings(
        world_size=world_size,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
        on_cpu=on_cpu,
        has_te=has_te,
        te_lacks=te_recipe.lacking() if has_te and not on_cpu else "",
        te_fp32_scales=te_recipe.has_fp32_scales(os.environ),
        has_deepep=is_installed("deep_ep"),
        megatron_version=importlib.metadata.version("megatron-core"),
        missing=frozenset(name for name in OPTIONAL if not is_installed(name)),
        lacks=lacking(TE) if has_te and not on_cpu else frozenset(),
        has_apex=has_fused_wgrad(),
        torch=installed_version(TORCH) or "",
        cuda=installed_version(CUDA) or "",
        cudnn=installed_version(CUDNN) or "",
        capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0),
        max_connections=max_connections(os.environ),
    )


def max_connections(env: Mapping[str, str]) -> int:
    """CUDA_DEVICE_MAX_CONNECTIONS of a process with these variables.

    Raises:
        RefusedArgument: it is no number.
    """
    text = env.get(MAX_CONNECTIONS, CUDA_DEFAULT_CONNECTIONS)
    if not (text.isascii() and text.isdecimal()):
        raise RefusedArgument(f"{MAX_CONNECTIONS}={text}: no number. Use {MAX_CONNECTIONS}=32")
    return int(text)


_imagined: Surroundings | None = None


@contextmanager
def imagined(around: Surroundings) -> Iterator[None]:
    """While inside, `detect` answers with `around`: for checks of a job that will run elsewhere."""
    global _imagined
    before, _imagined = _imagined, around
    try:
        yield
    finally:
        _imagined = before


def has_fused_wgrad() -> bool:
    """Whether Apex's extension for weight gradients can be imported (and not only our stand-in of its name)."""
    module = sys.modules.get("fused_weight_gradient_mlp_cuda")
    if module is not None:
        return not getattr(module, "__dsv3__", False)
    return is_installed("fused_weight_gradient_mlp_cuda")


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False
