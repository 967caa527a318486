"""What the checks of arguments have to know about the machine, as data, so that tests can invent machines."""

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

SUPPORTED_MEGATRON = ("0.19.0", "0.20.0")
OPTIONAL = ("wandb", "nvidia_resiliency_ext")  # packages that single options of Megatron need


@dataclass(frozen=True)
class Surroundings:
    """The job and the software around a run.

    Attributes:
        world_size: ranks of the job.
        ranks_per_node: ranks that share a machine.
        on_cpu: the CPU runtime is active.
        has_te: Transformer Engine is installed.
        te_lacks: what the installed Transformer Engine lacks for `--fp8-recipe dsv3`.
        has_deepep: DeepEP is installed.
        megatron_version: of megatron-core.
        files_here: the files and folders that options name are to be found on this machine.
        missing: which of `OPTIONAL` are not installed.
        checkpoint: a `checkpoint.start.Start` in place of the one that --load or --pretrained-checkpoint names.
    """

    world_size: int = 1
    ranks_per_node: int = 8
    on_cpu: bool = False
    has_te: bool = True
    te_lacks: str = ""
    has_deepep: bool = True
    megatron_version: str = SUPPORTED_MEGATRON[0]
    files_here: bool = True
    missing: frozenset[str] = frozenset()
    checkpoint: Any = None


def detect() -> Surroundings:
    """The surroundings of this process (from torchrun's environment and the installed packages)."""
    from dsv3_megatron import cpu
    from dsv3_megatron.fp8 import te_recipe

    has_te = _installed("transformer_engine")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Surroundings(
        world_size=world_size,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
        on_cpu=cpu.is_active(),
        has_te=has_te,
        te_lacks=te_recipe.lacking() if has_te and not cpu.is_active() else "",
        has_deepep=_installed("deep_ep"),
        megatron_version=importlib.metadata.version("megatron-core"),
        missing=frozenset(name for name in OPTIONAL if not _installed(name)),
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False
