"""Which batch sizes of a ramp a layout can run, and how many data-parallel ranks those that it cannot would need."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsv3_megatron.pipeline.traits import TRAITS
from dsv3_megatron.recipe.ramp import BatchRamp


@dataclass(frozen=True)
class Replicas:
    """The part of a layout that a batch is divided over.

    Attributes:
        data_parallel_size: ranks that hold different samples; Megatron's, without DualPipe's mirrored copies.
        pipeline_ranks: as given by `--pipeline-model-parallel-size`.
        schedule: `--pipeline-schedule`.
        micro_batch_size: sequences.
        block: what the data-parallel size must be a multiple of (expert-parallel ranks over TP × CP).
    """

    data_parallel_size: int
    pipeline_ranks: int = 1
    schedule: str = "1f1b"
    micro_batch_size: int = 1
    block: int = 1

    @property
    def directions(self) -> int:
        """Microbatches that begin at the same time on one data-parallel rank: two under DualPipe."""
        return TRAITS[self.schedule].directions

    @property
    def least_microbatches(self) -> int:
        """That the schedule needs, over both directions together."""
        return TRAITS[self.schedule].least_microbatches * self.pipeline_ranks

    def microbatches(self, batch_size: int) -> tuple[int, int]:
        """Microbatches of one data-parallel rank, and the samples left over."""
        count, rest = divmod(batch_size, self.micro_batch_size * self.data_parallel_size * self.directions)
        return count * self.directions, rest

    def fits(self, batch_size: int) -> bool:
        """Whole microbatches in both directions, and enough of them for the schedule."""
        count, rest = self.microbatches(batch_size)
        return rest == 0 and count >= max(1, self.least_microbatches)

    def most(self, batch_size: int) -> "Replicas | None":
        """The most data-parallel ranks, at most these, that can run a batch size; None where no number can."""
        for size in range(self.data_parallel_size // self.block * self.block, 0, -self.block):
            fewer = replace(self, data_parallel_size=size)
            if fewer.fits(batch_size):
                return fewer
        return None


@dataclass(frozen=True)
class Phase:
    """Neighbouring batch sizes that run on the same number of ranks.

    Attributes:
        first_step, first_sample: where it begins.
        batch_sizes: of its levels.
        replicas: what can run it; None where nothing can.
    """

    first_step: int
    first_sample: int
    batch_sizes: tuple[int, ...]
    replicas: Replicas | None


def plan(ramp: BatchRamp, available: Replicas, first_sample: int = 0) -> list[Phase]:
    """Phases of the run from `first_sample` on, each with the most data-parallel ranks it can use."""
    phases: list[Phase] = []
    for step, sample, size in _levels_from(ramp, first_sample):
        replicas = available.most(size)
        if phases and phases[-1].replicas == replicas:
            phases[-1] = replace(phases[-1], batch_sizes=(*phases[-1].batch_sizes, size))
        else:
            phases.append(Phase(step, sample, (size,), replicas))
    return phases


def first_misfit(ramp: BatchRamp, available: Replicas, first_sample: int = 0) -> Phase | None:
    """The first phase from `first_sample` on that these ranks cannot run, with the ranks that could."""
    for step, sample, size in _levels_from(ramp, first_sample):
        if not available.fits(size):
            return Phase(step, sample, (size,), available.most(size))
    return None


def _levels_from(ramp: BatchRamp, first_sample: int) -> Iterator[tuple[int, int, int]]:
    """The level that `first_sample` lies in, and those after it: first step, first sample, batch size."""
    levels = list(ramp.levels())
    begun = [level for level in levels if level.first_sample <= first_sample]
    for level in levels[len(begun) - 1 :]:
        yield level.first_step, level.first_sample, level.batch_size
