"""The batch size as a staircase over the samples of a run, and the steps it makes."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """Steps of one batch size.

    Attributes:
        first_step: steps done before it.
        first_sample: samples consumed before it; at least the level's threshold, since steps are not cut.
        batch_size: sequences per step.
    """

    first_step: int
    first_sample: int
    batch_size: int


@dataclass(frozen=True)
class BatchRamp:
    """A batch size that changes where the consumed samples reach a threshold.

    Attributes:
        thresholds: samples, increasing from 0.
        batch_sizes: sequences per step from each threshold on.
    """

    thresholds: tuple[int, ...]
    batch_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.thresholds[0] != 0 or list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(f"thresholds must increase from 0, in whole samples: {self.thresholds}")
        if min(self.batch_sizes) < 1:
            raise ValueError(f"batch sizes must be positive: {self.batch_sizes}")

    @classmethod
    def linear(cls, start: int, end: int, increment: int, num_samples: int) -> "BatchRamp":
        """From `start` to `end` in equal steps, `end` from `num_samples` on.

        Every batch size but the last lasts for the same number of samples, so the batch grows linearly with the
        samples consumed. The shape of DeepSeek-V3's ramp is unpublished ("gradually", report §4.2).
        """
        num_steps, rest = divmod(end - start, increment) if increment > 0 else (0, 1)
        if rest or num_steps < 1:
            raise ValueError(
                f"--batch-ramp {start} {increment}: must reach --global-batch-size {end} in whole increments"
            )
        if num_samples < num_steps:
            raise ValueError(
                f"--batch-ramp {start} {increment}: {num_samples} samples are too few for {num_steps} increments; "
                "use more --train-tokens, a larger increment, or leave it out"
            )
        levels = range(num_steps + 1)
        return cls(
            tuple(i * num_samples // num_steps for i in levels), tuple(start + i * increment for i in levels)
        )

    def batch_size(self, samples: int) -> int:
        """Batch size of the step that begins after `samples`."""
        return self.batch_sizes[bisect_right(self.thresholds, samples) - 1]

    def levels(self) -> Iterator[Level]:
        """Batch sizes in order, with the step and sample where each begins; those that no step has are left out."""
        step = sample = 0
        for index, batch_size in enumerate(self.batch_sizes):
            if index + 1 < len(self.thresholds):
                num_steps = max(0, -(-(self.thresholds[index + 1] - sample) // batch_size))
                if not num_steps:
                    continue
            else:
                num_steps = 0
            yield Level(step, sample, batch_size)
            step += num_steps
            sample += num_steps * batch_size

    def samples_after(self, step: int) -> int:
        """Samples consumed by the first `step` steps."""
        level = [level for level in self.levels() if level.first_step <= step][-1]
        return level.first_sample + (step - level.first_step) * level.batch_size

    def megatron_schedule(self, seq_length: int) -> str:
        """The value of Megatron's `--step-batch-size-schedule`, whose thresholds are tokens."""
        pairs = zip(self.thresholds, self.batch_sizes, strict=True)
        return " ".join(f"{threshold * seq_length}:{batch_size}" for threshold, batch_size in pairs)
