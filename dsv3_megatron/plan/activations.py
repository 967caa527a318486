"""What a stage keeps from a microbatch's forward to its backward, tensor by tensor.

A stage is a row of blocks (attention, MLP, …). Each backend lists what its blocks keep: Transformer Engine's
fused modules on a GPU (`activations_te.py`), or the reference backend in plain PyTorch
(`activations_reference.py`), whose sums the tests compare with the live tensors of real runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dsv3_megatron.plan import activations_reference, activations_te
from dsv3_megatron.plan.job import Job, Stage
from dsv3_megatron.plan.kept import Block


@dataclass(frozen=True)
class Footprint:
    """Bytes of one microbatch in one stage.

    Attributes:
        kept: between its forward and its backward.
        deferred: between an input-only backward and its weight gradients.
        forward: most during the forward, what it keeps included.
        backward: most during a backward, from `kept` on; weight gradients that are put off included.
        layer: of `kept`, the largest layer's.
    """

    kept: float
    deferred: float
    forward: float
    backward: float
    layer: float = 0.0


def blocks(job: Job, stage: Stage) -> list[Block]:
    """The stage in the order of its forward, as the job's backend runs it."""
    backend = activations_reference if job.transformer_impl == "local" else activations_te
    return backend.blocks(job, stage)


def footprint(job: Job, stage: Stage) -> Footprint:
    """Walks the blocks forth and back."""
    row = blocks(job, stage)
    live = forward = 0.0
    for block in row:
        live += block.size
        forward = max(forward, live + block.forward)
    kept = backward = live
    for block in reversed(row):
        backward = max(backward, live + block.backward)
        live -= block.size
        if job.delays_weight_gradients:
            live += block.deferred
    layers = row[: 2 * (stage.dense + stage.moe)]  # two blocks each: attention and MLP
    layer = max((a.size + b.size for a, b in pairwise(layers)), default=0.0)
    return Footprint(kept, sum(block.deferred for block in row), forward, max(backward, live), layer)


def by_part(row: Sequence[Block]) -> dict[str, float]:
    """Kept bytes of each part of the model."""
    parts: dict[str, float] = {}
    for block in row:
        for tensor in block.kept:
            parts[tensor.part] = parts.get(tensor.part, 0) + tensor.bytes
    return parts
