"""The vocabulary of a schedule: actions, and the table that holds them.

A schedule is data. The simulator, the checker, the pictures and the runner all read the same table, so what
is drawn and proved is what runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self


class Kind(StrEnum):
    """What a rank does in one slot of the table."""

    F = "F"  # forward
    B = "B"  # full backward: gradients of the input and of the weights
    B_INPUT = "I"  # backward for the input only; its weight gradients wait in the rank's queue
    W = "W"  # weight gradients of the oldest waiting input-only backward
    PAIR = "F&B"  # a forward and a full backward whose communication and computation overlap


class Action(NamedTuple):
    """One slot of a rank's program.

    `stage` counts from the embedding (0) to the head. `direction` is the stream the microbatch belongs to: 0
    runs down the ranks, 1 (DualPipe only) runs up. `microbatch` counts over all directions together.
    For a pair, these three describe its forward, and `backward` is the full backward beside it.
    """

    kind: Kind
    stage: int
    direction: int
    microbatch: int
    backward: "Action | None" = None

    @property
    def parts(self) -> tuple["Action", ...]:
        """The single computations of this slot, in the order in which they count: a pair is its F, then its
        B."""
        if self.backward is None:
            return (self,)
        return (Action(Kind.F, self.stage, self.direction, self.microbatch), self.backward)

    def __str__(self) -> str:
        text = f"{self.kind if self.backward is None else Kind.F}{self.microbatch}@{self.stage}"
        return text if self.backward is None else f"{text}&{self.backward}"

    @classmethod
    def pair(cls, forward: "Action", backward: "Action") -> Self:
        """The overlapped pair of a forward and a full backward."""
        return cls(Kind.PAIR, *forward[1:4], backward=backward)


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule: for each rank, its actions in the order in which it runs them.

    Attributes:
        name: as given to `build_schedule`.
        num_microbatches: over all directions together.
        placement: `placement[direction][stage]` is the rank that holds the stage for that direction. With two
            directions every stage is placed twice (DualPipe's 2× parameters).
        ranks: `ranks[rank]` is the tuple of the rank's actions.
    """

    name: str
    num_microbatches: int
    placement: tuple[tuple[int, ...], ...]
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        return len(self.placement[0])

    @property
    def num_directions(self) -> int:
        return len(self.placement)

    def rank_of(self, stage: int, direction: int) -> int:
        """The rank that computes `stage` for microbatches of `direction`."""
        return self.placement[direction][stage]

    def stages_of(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The (stage, direction) pairs placed on `rank`, by stage."""
        held = [
            (stage, direction)
            for direction, ranks in enumerate(self.placement)
            for stage, holder in enumerate(ranks)
            if holder == rank
        ]
        return tuple(sorted(held))

    def microbatches_of(self, direction: int) -> range:
        """The microbatches of one direction: the first half runs down the ranks, the second half up."""
        per_direction = self.num_microbatches // self.num_directions
        return range(direction * per_direction, (direction + 1) * per_direction)

    def forward_only(self) -> "Schedule":
        """The same order without backward passes, for evaluation."""
        ranks = tuple(
            tuple(part for action in actions for part in action.parts if part.kind is Kind.F)
            for actions in self.ranks
        )
        return Schedule(self.name, self.num_microbatches, self.placement, ranks)


def in_flight(actions: Iterable[Action]) -> Iterable[int]:
    """Microbatch-stages whose activations a rank holds, after each single computation of its program.

    A forward adds one, a full or input-only backward removes one; a pair counts its forward first.
    """
    held = 0
    for action in actions:
        for part in action.parts:
            if part.kind is Kind.F:
                held += 1
            elif part.kind is not Kind.W:
                held -= 1
            yield held


def peak_in_flight(actions: Iterable[Action]) -> int:
    """The most microbatch-stages a rank holds activations of at once (see `in_flight`)."""
    return max(in_flight(actions), default=0)
