"""A lower bound of the step of any schedule on a zigzag's placement."""

from math import floor, inf

from .dealing import Budget
from .simulate import Costs, Durations


def lower_bound(num_ranks: int, num_microbatches: int, chunks: int, costs: Costs, budget: Budget) -> float:
    """No table of `num_ranks` ranks with `chunks` stages each, down and up in turn, is shorter under `costs`.

    On each rank: its first backward comes no earlier than the first microbatch has been through all forwards and back
    to the rank's last stage (t_B). Before it at most x forwards have run, as many as time and memory allow, so that at
    most N − x of the N backwards are in a pair:

        T ≥ t_B + (N − x)·F&B + x·B + max(0, tail − D·W)

    The tail is what follows the rank's last backward: the input gradients down to stage 0, and its weight gradients.
    Meanwhile the rank can run at most the D = ⌊cap / deferred⌋ weight gradients that it may keep. Messages are free
    in it. The largest over the ranks holds; with costs per stage the cheapest pairing and the dearest stages' W count.
    """
    num_stages = num_ranks * chunks
    clock = Durations(costs, num_stages)
    kept, deferred = (budget.per_stage(name, num_stages) for name in ("kept", "deferred"))
    inputs = [b - w for b, w in zip(clock.b, clock.w, strict=True)]
    return max(
        _of_rank(
            _stages(num_ranks, chunks, rank), num_microbatches, clock, inputs, budget.cap, kept, deferred
        )
        for rank in range(num_ranks)
    )


def _stages(num_ranks: int, chunks: int, rank: int) -> list[int]:
    return [c * num_ranks + (rank if c % 2 == 0 else num_ranks - 1 - rank) for c in range(chunks)]


def _of_rank(
    stages: list[int],
    num_microbatches: int,
    clock: Durations,
    inputs: list[float],
    cap: float,
    kept: tuple[float, ...],
    deferred: tuple[float, ...],
) -> float:
    f, b, w = clock.f, clock.b, clock.w
    first_backward = sum(f) + sum(inputs[stages[-1] + 1 :])
    shortest = min(f[s] for s in stages)
    time = first_backward - sum(f[: stages[0]])
    smallest = min(kept[s] for s in stages)
    most = min(
        num_microbatches * len(stages),
        floor(time / shortest + 1e-9) if shortest else inf,
        floor(cap / smallest + 1e-9) if smallest else inf,
    )
    alone = num_microbatches * sum(b[s] for s in stages)
    # What a forward adds to the backward beside it, at least.
    beside = min(min(clock.pair(i, j) - b[j], f[i]) for i in stages for j in stages)
    work = alone + (num_microbatches * len(stages) - most) * beside
    tail = sum(inputs[: stages[0]]) + w[0]
    least = min(deferred[s] for s in stages)
    later = floor(cap / least + 1e-9) if least else inf
    hidden = later * max(w[s] for s in stages) if any(w[s] for s in stages) else 0.0
    return first_backward + work + max(0.0, tail - hidden)
