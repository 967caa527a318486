"""DeepSeek-V3's times and memory: what a zigzag is dealt by in training where nothing was measured."""

from typing import Any

from .simulate import Costs

# Milliseconds of one of 16 stages of DeepSeek-V3 on H800 (B is full): Table 4 of arXiv 2505.09343, read as
# rank 0 of DualPipe's loop.
V3_COSTS = {"f": 49.0, "b": 107.0, "w": 32.0, "fb": 144.0}
# What waiting weight gradients of DeepSeek-V3 hold, against the activations of the same stage: 4.46 and 2.47 GiB of
# four layers (`dsv3_megatron.plan.activations`).
V3_DEFERRED = 1.8


def nominal_options(num_ranks: int, chunks: int | None = None) -> dict[str, Any]:
    """Arguments of `build_schedule` for a zigzag in training; its cap is DualPipe's memory for the same model.

    chunks: stages of a rank, 2 by default. With 2 the cap is that of 2·num_ranks + 1 microbatches in flight in stages
    of which DualPipe on twice as many ranks has 2·num_ranks.
    """
    chunks = chunks or 2
    return {
        "chunks": chunks,
        "costs": Costs(**V3_COSTS),
        "memory_cap": chunks * num_ranks + chunks // 2,
        "deferred": V3_DEFERRED,
    }
