"""When a chunk's gradients may be reduced: after the last pass that adds to them, and not before."""

from collections.abc import Mapping, Sequence
from typing import Any


class GradientReduce:
    """Starts Megatron's gradient reduction chunk by chunk, as the schedule completes them.

    Megatron's DDP counts gradients as they arrive in the last microbatch, which assumes that a microbatch's weight
    gradients come with its backward. Here weight gradients are delayed, and a rank's two stages finish at different
    times, so the runner says when: `complete(stage)` after the last pass of a stage (its last W). The reduction itself
    is DDP's, asynchronous with --overlap-grad-reduce, and waited for by finalize_model_grads as always.

    Args:
        chunks: stage number to DDP-wrapped chunk.
        writers: stage number to the other stages whose backward also adds to the chunk's parameters (MTP adds to the
            embedding of the first stage, which both share).
    """

    def __init__(self, chunks: Mapping[int, Any], writers: Mapping[int, Sequence[int]]) -> None:
        self._chunks = chunks
        self._needs = {stage: {stage, *writers.get(stage, ())} for stage in chunks}
        self._complete: set[int] = set()
        self._force_all_reduce = False

    def begin(self, force_all_reduce: bool) -> None:
        """Start a step."""
        self._complete.clear()
        self._force_all_reduce = bool(force_all_reduce)
        for bucket in self._buckets(*self._chunks):
            bucket.is_last_microbatch = False  # nothing starts by counting …
            bucket.is_first_batch = False  # … and `finish_grad_sync` finds everything started

    def complete(self, stage: int) -> None:
        """All gradients that `stage` computes on this rank are there."""
        self._complete.add(stage)
        for chunk, needs in self._needs.items():
            if stage in needs and needs <= self._complete:
                for bucket in self._buckets(chunk):
                    bucket.start_grad_sync(force_all_reduce=self._force_all_reduce)

    def _buckets(self, *stages: int) -> list[Any]:
        chunks = [self._chunks[stage] for stage in stages]
        return [
            bucket
            for chunk in chunks
            if getattr(chunk, "ddp_config", None) is not None and chunk.ddp_config.overlap_grad_reduce
            for bucket in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
        ]
