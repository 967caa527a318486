"""Host memory of a machine while a checkpoint is saved and loaded, for the average of the weights, and for an offloaded
optimizer.

`--dist-ckpt-optim-fully-reshardable` turns the sharded optimizer state into whole tensors: fp32 weights and both
moments, 12 bytes per parameter of a rank, in host memory. Without the memory-efficient form *every* rank gathers all of
its parameters' state to save it; with it only one rank of each data-parallel group does, over gloo. To load, every rank
holds all of it either way (Megatron `DistributedOptimizer.sharded_param_state_fully_reshardable`).
"""

import os
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GATHERED = 12  # bytes per parameter: fp32 weight, exp_avg, exp_avg_sq
AVERAGE = 4  # bytes per parameter of the average of the weights
OFFLOADED = 16  # of an offloaded parameter, in fp32: weight, gradient, both moments (Megatron `HybridDeviceOptimizer`)


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the fullest machine, beside what Python and data loaders take.

    Attributes:
        save, load: while a fully reshardable checkpoint is written or read.
        average: of `--ema-decay`, all the time; its copy while an asynchronous save is under way is in `save`.
        optimizer: of `--optimizer-cpu-offload`, all the time.
    """

    save: float
    load: float
    average: float = 0.0
    optimizer: float = 0.0

    @property
    def always(self) -> float:
        """While the job trains."""
        return self.average + self.optimizer

    @property
    def peak(self) -> float:
        """The most that a job needs which saves and loads."""
        return max(self.save, self.load) + self.always


def host_memory(
    experts: float,
    rest: float,
    ranks_per_node: int,
    *,
    dense_ranks_per_stage: int = 1,
    reshardable: bool = True,
    memory_efficient: bool = False,
    average: bool = False,
    async_save: bool = False,
    offloaded: float = 0,
) -> HostMemory:
    """Of a machine whose ranks all hold as much as the fullest one.

    Args:
        experts, rest: parameters of a rank: routed experts, and all others.
        ranks_per_node: ranks of a machine.
        dense_ranks_per_stage: TP × CP: as many ranks of a stage are the first of their data-parallel group.
        reshardable: `--dist-ckpt-optim-fully-reshardable`; without it shards are written as they are, and nothing is
            gathered.
        memory_efficient: `--distrib-optim-fully-reshardable-mem-efficient`.
        average: `--ema-decay`.
        async_save: `--async-save`: the average is copied for the background writer.
        offloaded: parameters whose optimizer a rank has in host memory, of its shard.
    """
    everywhere = (experts + rest) * ranks_per_node
    # Experts of one machine's ranks can all be the first of their groups; of dense weights TP × CP ranks are.
    first = experts * ranks_per_node + rest * min(ranks_per_node, dense_ranks_per_stage)
    gathered = GATHERED if reshardable else 0
    copy = AVERAGE * everywhere if average and async_save else 0
    return HostMemory(
        save=gathered * (first if memory_efficient else everywhere) + copy,
        load=gathered * everywhere,
        average=AVERAGE * everywhere if average else 0,
        optimizer=OFFLOADED * offloaded * ranks_per_node,
    )


def of_job(args: Namespace, experts: float, rest: float, ranks_per_node: int, world_size: int) -> HostMemory:
    """`host_memory` as Megatron's validated arguments ask for it."""
    stage = world_size // args.pipeline_model_parallel_size
    expert_ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or 1)
    shard = experts / max(1, stage // expert_ranks) + rest * args.tensor_model_parallel_size / stage
    return host_memory(
        experts,
        rest,
        ranks_per_node,
        dense_ranks_per_stage=args.tensor_model_parallel_size * args.context_parallel_size,
        reshardable=bool(args.save) and args.dist_ckpt_optim_fully_reshardable,
        memory_efficient=args.distrib_optim_fully_reshardable_mem_efficient,
        average=args.ema_decay is not None,
        async_save=args.async_save,
        offloaded=shard * args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0,
    )


def parameters_held(chunks: Iterable[Any]) -> tuple[float, float]:
    """Parameters of a rank's model chunks: routed experts, and all others."""
    sizes = {
        id(p): (".experts." in name, p.numel()) for chunk in chunks for name, p in chunk.named_parameters()
    }
    return (
        float(sum(size for expert, size in sizes.values() if expert)),
        float(sum(size for expert, size in sizes.values() if not expert)),
    )


def of_this_machine(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """Bytes that the processes of this machine, or of this container, may have."""
    there = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(there, float(text)) if text.isdecimal() else there


def problem(memory: HostMemory, available: float, memory_efficient: bool) -> tuple[str, str, str] | None:
    """The option that makes a machine with so many bytes too small, why, and what to use; None where it is not."""
    checkpoint = "--dist-ckpt-optim-fully-reshardable"
    there = f"of host memory on a machine, which has {available / 1e9:.0f}"
    if memory.always > available:
        return (
            "--optimizer-cpu-offload" if memory.optimizer > memory.average else "--ema-decay",
            f"training takes {memory.always / 1e9:.0f} GB {there}: {memory.average / 1e9:.0f} for the average of the "
            f"weights, {memory.optimizer / 1e9:.0f} for the offloaded optimizer",
            "no --ema-decay, a smaller --optimizer-offload-fraction, or machines with more memory",
        )
    if memory.load + memory.always > available:
        return (
            checkpoint,
            f"loading a checkpoint takes {(memory.load + memory.always) / 1e9:.0f} GB {there}: every rank holds the "
            "whole optimizer state of its parameters",
            "more pipeline or expert-parallel ranks, or machines with more memory",
        )
    if memory.save + memory.always > available:
        return (
            checkpoint,
            f"saving a checkpoint takes {(memory.save + memory.always) / 1e9:.0f} GB {there}: every rank gathers the "
            "whole optimizer state of its parameters",
            "more pipeline or expert-parallel ranks, or no --async-save"
            if memory_efficient
            else "--distrib-optim-fully-reshardable-mem-efficient",
        )
    return None
