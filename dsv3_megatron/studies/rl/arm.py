"""An arm of the demonstration: where it lives, what its trainer is started with, how far it is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_megatron.demo.run import quoted, saved_iteration

__all__ = ["Arm"]


@dataclass(frozen=True)
class Arm:
    """One process: a name, where it lives, what it is started with.

    Attributes:
        every: iterations between two measurements, and between two checkpoints.
        samples: (seeds, problems of each, samples of a problem) that are written to `samples.jsonl` at the end.
    """

    name: str
    folder: Path
    iterations: int
    overrides: Sequence[str]
    every: int
    samples: tuple[tuple[int, ...], int, int] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def sample_file(self) -> Path:
        return self.folder / "samples.jsonl"

    @property
    def held_out_file(self) -> Path:
        return self.folder / "held_out.json"

    def held_out(self) -> dict[int, dict[str, float]]:
        """Iteration → reward and length on held-out problems, so far."""
        found = json.loads(self.held_out_file.read_text()) if self.held_out_file.exists() else {}
        return {int(iteration): values for iteration, values in found.items()}

    @property
    def done(self) -> bool:
        sampled = self.samples is None or self.sample_file.exists()
        saved = saved_iteration(self.checkpoints) >= self.iterations
        return saved and sampled and self.iterations in self.held_out()

    def all_overrides(self) -> list[str]:
        """Of the trainer."""
        save = quoted(self.checkpoints)
        common = [f"save={save}", f"load={save}", f"save_interval={self.every}", "log_interval=1"]
        return [*self.overrides, f"train_iters={self.iterations}", *common]
