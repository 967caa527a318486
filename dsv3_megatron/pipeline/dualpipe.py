"""DualPipe and DualPipeV (DeepSeek-V3 report, §3.2.1; the eight steps are those of the public DualPipe).

Both run the same program. A rank holds two streams, written 0 and 1 as the program sees them:

- DualPipe on N ranks: the two directions. In the first half of the ranks stream 0 is direction 0, in the
  second half it is direction 1, so that the program is the same for rank k and rank N−1−k.
- DualPipeV on P ranks with 2P stages: the two limbs of the V, stage r on the way down and stage 2P−1−r on the
  way up; it is DualPipe on 2P ranks folded in the middle.
"""

from collections import deque

from .actions import Action, Kind


class _RankProgram:
    """Collects one rank's actions; each stream is (stage, direction, first microbatch)."""

    def __init__(self, *streams: tuple[int, int, int]) -> None:
        self.actions: list[Action] = []
        self._streams = streams
        self._next_forward = [first for _, _, first in streams]
        self._next_backward = [first for _, _, first in streams]
        self._waiting: deque[Action] = (
            deque()
        )  # input-only backwards whose W has not run: first in, first out

    def _take(self, kind: Kind, stream: int, counters: list[int]) -> Action:
        stage, direction, _ = self._streams[stream]
        action = Action(kind, stage, direction, counters[stream])
        counters[stream] += 1
        return action

    def forward(self, stream: int) -> None:
        self.actions.append(self._take(Kind.F, stream, self._next_forward))

    def backward(self, stream: int, input_only: bool = False) -> None:
        action = self._take(Kind.B_INPUT if input_only else Kind.B, stream, self._next_backward)
        self.actions.append(action)
        if input_only:
            self._waiting.append(action)

    def weight(self) -> None:
        self.actions.append(self._waiting.popleft()._replace(kind=Kind.W))

    def pair(self, forward_stream: int, backward_stream: int) -> None:
        forward = self._take(Kind.F, forward_stream, self._next_forward)
        backward = self._take(Kind.B, backward_stream, self._next_backward)
        self.actions.append(Action.pair(forward, backward))


def _run(program: _RankProgram, depth: int, r: int, num_main: int) -> tuple[Action, ...]:
    """The eight steps. `depth` ranks from an end of the pipeline to its middle, of which this one is number
    `r`."""
    outer = depth - r - 1  # ranks between this one and the middle
    is_middle = outer == 0

    # Step 1: nF0
    for _ in range(2 * outer):
        program.forward(0)

    # Step 2: nF0F1
    for _ in range(r + 1):
        program.forward(0)
        program.forward(1)

    # Step 3: nB1W1F1. Stream 1 has turned around; splitting its backward fills the gap that it left.
    for _ in range(outer):
        program.backward(1, input_only=True)
        program.weight()
        program.forward(1)

    # Step 4, the main step: nF0B1F1B0, all in overlapped pairs
    for i in range(num_main):
        if i == 0 and is_middle:
            # The neighbour waits for this forward: finishing it first, unpaired, makes the bubble smaller.
            program.forward(0)
            program.backward(1)
        else:
            program.pair(0, 1)
        program.pair(1, 0)

    # Step 5: nB1F1B0
    for _ in range(outer):
        program.backward(1)
        program.pair(1, 0)

    # Step 6: nB1B0, input-only from the middle of the step on
    for i in range(2 * (r + 1)):
        program.backward((i + 1) % 2, input_only=i > r)

    # Step 7: nWB0
    for _ in range(outer):
        program.weight()
        program.backward(0, input_only=True)

    # Step 8: nW
    for _ in range(r + 1):
        program.weight()
    return tuple(program.actions)


def dualpipe(num_ranks: int, num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Actions of every rank; `num_ranks` even, `num_microbatches` (both directions) even and ≥
    2·num_ranks."""
    half = num_microbatches // 2
    ranks = []
    for rank in range(num_ranks):
        r = min(rank, num_ranks - 1 - rank)
        streams = [(rank, 0, 0), (num_ranks - 1 - rank, 1, half)]
        if rank != r:
            streams.reverse()
        ranks.append(_run(_RankProgram(*streams), num_ranks // 2, r, half - num_ranks + r + 1))
    return tuple(ranks)


def dualpipev(num_ranks: int, num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Actions of every rank, rank r holding stages r and 2·num_ranks−1−r; `num_microbatches` ≥
    2·num_ranks."""
    return tuple(
        _run(
            _RankProgram((r, 0, 0), (2 * num_ranks - 1 - r, 0, 0)),
            num_ranks,
            r,
            num_microbatches - 2 * num_ranks + r + 1,
        )
        for r in range(num_ranks)
    )
