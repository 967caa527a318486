"""A whole copy of the trained model on each rank, for an engine that cannot run the trainer's stages.

Weights travel by their global names from a rank that has them to all ranks, one tensor after the other: no file, and no
more memory than the copy and one full tensor.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.specs.builder import DSV3ModelBuilder, DSV3ModelConfig
from dsv3_megatron.specs.names import Shard, global_names, named_weights, unwrap

__all__ = ["WholeCopy", "WholeWeights", "needs_copy"]


def needs_copy(model: Sequence[Any]) -> bool:
    """Whether the engine cannot run the trainer's model where it is: a pipeline, in stages or in chunks of a V."""
    from megatron.core import mpu

    return len(model) > 1 or mpu.get_pipeline_model_parallel_world_size() > 1


class WholeCopy:
    """A model of one process on this rank, and what fills it.

    Attributes:
        model: GPTModel in evaluation mode, without gradients.
    """

    def __init__(self, trained: Sequence[Any], args: Any) -> None:
        from megatron.training.argument_utils import gpt_config_from_args

        config = gpt_config_from_args(args, model_config_cls=DSV3ModelConfig)
        config.transformer = _of_one_process(config.transformer)
        groups = _groups_of_one()
        builder = _WholeBuilder(config)
        # Building a model draws no numbers of the trainer's: its weights are overwritten.
        config.transformer.perform_initialization = False
        self.model = builder.build_model(groups)
        self.model.to(next(unwrap(trained[0]).parameters()).device)
        if config.transformer.params_dtype != torch.float32:
            self.model.to(config.transformer.params_dtype)
        self.model.eval().requires_grad_(False)
        self._weights = WholeWeights(trained)

    @torch.no_grad()
    def fill(self, trained: Sequence[Any]) -> None:
        """Take over the weights that the trainer's ranks have now; to be called on every rank."""
        there = {name.name: weight for name, weight in _named(self.model)}
        for name, full in self._weights.each(trained):
            if name in there:
                there[name].copy_(full)


class WholeWeights:
    """The full tensors of a model that is spread over ranks, one after the other, on every rank.

    Attributes:
        described: (global name, shape, dtype) of each, in the order in which they come.
    """

    def __init__(self, trained: Sequence[Any]) -> None:
        self._plan = _plan(trained)
        self.described = [
            (name, Shard(dim, 0, len(owners), blocks).full_shape(shape), dtype)
            for name, (owners, shape, dtype, dim, blocks) in self._plan.items()
        ]

    @torch.no_grad()
    def each(self, trained: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Global names and full tensors, as the trainer's ranks have them now; to be gone through on every rank."""
        own = _by_name(trained)
        for name, (owners, shape, dtype, dim, blocks) in self._plan.items():
            parts = []
            for owner in owners:
                part = own[name].detach().clone() if owner == dist.get_rank() else None
                if part is None:
                    part = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
                dist.broadcast(part, owner)
                parts.append(part)
            yield name, Shard.join(parts, Shard(dim, 0, len(owners), blocks))


def _named(chunk: Any) -> list[tuple[Any, Any]]:
    names = global_names(chunk)
    return [(names[local], weight) for local, weight in named_weights(chunk).items()]


def _by_name(model: Sequence[Any]) -> dict[str, Any]:
    return {name.name: weight for chunk in model for name, weight in _named(chunk)}


def _plan(
    trained: Sequence[Any],
) -> dict[str, tuple[list[int], tuple[int, ...], torch.dtype, int | None, int]]:
    """For each global name: the first rank that has each tensor-parallel part; a part's shape, dtype; the split."""
    own = {
        name.name: (name.shard, tuple(weight.shape), weight.dtype)
        for chunk in trained
        for name, weight in _named(chunk)
    }
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    owners: dict[str, dict[int, int]] = {}
    about: dict[str, tuple[Shard, tuple[int, ...], torch.dtype]] = {}
    for rank, part in enumerate(everybody):
        for name, found in part.items():
            owners.setdefault(name, {}).setdefault(found[0].index, rank)
            about.setdefault(name, found)
    return {
        name: ([ranks[i] for i in sorted(ranks)], shape, dtype, shard.dim, shard.blocks)
        for name, ranks in sorted(owners.items())
        for shard, shape, dtype in [about[name]]
    }


def _of_one_process(trained: Any) -> Any:
    config = copy.copy(trained)
    for name, value in (
        ("tensor_model_parallel_size", 1),
        ("pipeline_model_parallel_size", 1),
        ("virtual_pipeline_model_parallel_size", None),
        ("pipeline_model_parallel_layout", None),
        ("expert_model_parallel_size", 1),
        ("expert_tensor_parallel_size", 1),
        ("sequence_parallel", False),
        ("moe_token_dispatcher_type", "alltoall"),
        ("delay_wgrad_compute", False),
        ("overlap_moe_expert_parallel_comm", False),
        ("recompute_granularity", None),
        ("num_layers_in_first_pipeline_stage", None),
        ("num_layers_in_last_pipeline_stage", None),
    ):
        setattr(config, name, value)
    return config


class _WholeBuilder(DSV3ModelBuilder):
    """All stages in one chunk, wherever the trainer's pipeline has them."""

    def is_first_stage(self, pg_collection: Any, vp_stage: int | None) -> bool:
        return True

    def is_last_stage(self, pg_collection: Any, vp_stage: int | None) -> bool:
        return True


def _groups_of_one() -> Any:
    """Groups with this rank alone; every rank takes part in making all of them."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    alone = None
    for rank in range(dist.get_world_size()):
        group = dist.new_group([rank])
        if rank == dist.get_rank():
            alone = group
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for name in vars(groups):
        value = getattr(groups, name)
        setattr(groups, name, [alone for _ in value] if isinstance(value, list) else alone)
    return groups
