"""Zigzag: V's of two stages per rank, one after the other, whose weight gradients are dealt under a memory cap.

A rank holds `chunks` = 2k stages. Stage c·P + x is on rank x where c is even and on rank P−1−x where it is odd: the
microbatches run down the ranks and back up k times (with k = 1 this is DualPipeV's placement). There are two orders of
forwards and backwards, in two forms. Which pairs are split at the two ends of a step, and where weight gradients run,
is decided by simulating (`dealing.py`), and the shortest of all variants is the table.

Why a single V suffices: DualPipe on P ranks, folded in the middle, is a V on P/2.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import inf

from .actions import Action, Kind, Schedule
from .bound import lower_bound
from .dealing import Budget, Deal, deal
from .nominal import V3_COSTS
from .simulate import Costs, simulate

ALPHAS = (
    0.8,
    0.6,
    1.0,
    0.5,
    0.4,
)  # how many pairs a rank splits at the end of a step, of the ranks behind it
EXTRAS = (-1, 0, 1)  # how many more it splits at the beginning
PATIENCE = (0.0, 0.5, 1.0)  # for how much of a W's time a rank waits for a message

Order = tuple[tuple[Action, ...], ...]  # by rank: F, pairs, and lone backwards, which are input-only


def zigzag_placement(num_ranks: int, chunks: int) -> tuple[int, ...]:
    """The rank of each stage."""
    down = tuple(range(num_ranks))
    return (down + down[::-1]) * (chunks // 2)


def default_cap(num_ranks: int, chunks: int) -> int:
    """Chunks in flight that the orders need, and one more."""
    return chunks * num_ranks + 2


@lru_cache(maxsize=64)
def zigzag(
    num_ranks: int,
    num_microbatches: int,
    chunks: int,
    costs: Costs,
    budget: Budget,
    alphas: tuple[float, ...] = ALPHAS,
) -> Deal:
    """The shortest table found: built once for the same arguments, and the same in every process.

    Args:
        costs: by which it is dealt; per stage, a tuple has one number for each of the `chunks`·`num_ranks` stages.
        budget: memory.
        alphas: that are tried.

    Raises:
        ValueError: the budget is too small for any of the orders.
    """
    best: Deal | None = None
    bound = lower_bound(num_ranks, num_microbatches, chunks, costs, budget)
    for order in _orders(num_ranks, num_microbatches, chunks, alphas):
        for patience in PATIENCE:
            limit = inf if best is None else best.makespan
            dealt = deal(order, num_ranks * chunks, costs, budget, patience, limit)
            if dealt is not None and dealt.makespan < limit:
                best = dealt
        if best is not None and best.makespan <= bound * (1 + 1e-12):
            break
    if best is None:
        raise ValueError(
            f"memory_cap={budget.cap:g} is too little for zigzag on num_ranks={num_ranks} with chunks={chunks} and "
            f"num_microbatches={num_microbatches}; use {default_cap(num_ranks, chunks)} "
            "(chunks·num_ranks + 2, in activations of one chunk), or fewer ranks"
        )
    if _uneven(costs):
        # What is dealt by even times may suit uneven ones too, so that measuring never makes a table worse.
        for even in (Costs(), Costs(**V3_COSTS)):
            other = zigzag(num_ranks, num_microbatches, chunks, even, budget, alphas)
            placement = (zigzag_placement(num_ranks, chunks),)
            makespan = simulate(Schedule("zigzag", num_microbatches, placement, other.ranks), costs).makespan
            if makespan < best.makespan:
                best = Deal(other.ranks, makespan)
    return best


def _uneven(costs: Costs) -> bool:
    return any(isinstance(getattr(costs, name), tuple) for name in ("f", "b", "w", "fb"))


def _orders(num_ranks: int, num_microbatches: int, chunks: int, alphas: tuple[float, ...]) -> Iterator[Order]:
    seen: set[Order] = set()
    for alpha in alphas:
        orders = [slots_order(num_ranks, num_microbatches, chunks, alpha, extra) for extra in EXTRAS]
        if chunks == 2 and num_microbatches >= 2 * num_ranks:
            orders.insert(0, v_order(num_ranks, num_microbatches, alpha))
        for order in orders:
            if order not in seen:
                seen.add(order)
                yield order


class _Streams:
    """One rank's actions over its two stages, each of which goes through the microbatches in order."""

    def __init__(self, *stages: int) -> None:
        self.actions: list[Action] = []
        self._stages = stages
        self._forward, self._backward = [0, 0], [0, 0]

    def _take(self, kind: Kind, stream: int, counters: list[int]) -> Action:
        counters[stream] += 1
        return Action(kind, self._stages[stream], 0, counters[stream] - 1)

    def forward(self, stream: int) -> None:
        self.actions.append(self._take(Kind.F, stream, self._forward))

    def backward(self, stream: int) -> None:
        self.actions.append(self._take(Kind.B_INPUT, stream, self._backward))

    def pair(self, forward: int, backward: int) -> None:
        first = self._take(Kind.F, forward, self._forward)
        self.actions.append(Action.pair(first, self._take(Kind.B, backward, self._backward)))


def v_order(num_ranks: int, num_microbatches: int, alpha: float) -> Order:
    """DualPipeV's order with another beginning and end: k = 1, at least two microbatches for each rank."""
    ranks = []
    for r in range(num_ranks):
        outer = num_ranks - 1 - r  # ranks between this one and the turn
        split = round(alpha * outer)
        rank = _Streams(r, 2 * num_ranks - 1 - r)
        # Steps 1 and 2: forwards of the way down, then of both ways.
        for _ in range(2 * outer):
            rank.forward(0)
        for _ in range(r + 1):
            rank.forward(0)
            rank.forward(1)
        # Step 3: the first backwards arrive; no pair yet, since the next rank waits for their gradients.
        for _ in range(outer):
            rank.backward(1)
            rank.forward(1)
        # Step 4, the main step, in overlapped pairs.
        for _ in range(num_microbatches - 2 * num_ranks + r + 1):
            rank.pair(0, 1)
            rank.pair(1, 0)
        # Step 5: no forwards of the way down are left. The last pairs are split, so that the end begins earlier.
        for _ in range(outer - split):
            rank.backward(1)
            rank.pair(1, 0)
        for _ in range(split):
            rank.backward(1)
            rank.forward(1)
        # Steps 6 and 7: backwards of both ways, then of the way down.
        for _ in range(r + 1):
            rank.backward(1)
            rank.backward(0)
        for _ in range(outer + split):
            rank.backward(0)
        ranks.append(tuple(rank.actions))
    return tuple(ranks)


def slots_order(num_ranks: int, num_microbatches: int, chunks: int, alpha: float, extra: int) -> Order:
    """Any number of chunks and microbatches: everything has a slot, and a slot with a forward and a backward is a pair.

    Microbatches go in groups of `num_ranks`, two slots apart. The forward of stage s stands s slots behind the entry
    of its microbatch, the backward 2S−1−s: a rank's forwards of one slot all have one parity, its backwards too, so
    that never two of either meet.
    """
    stages = chunks * num_ranks
    placement = zigzag_placement(num_ranks, chunks)
    slots: list[dict[int, list[Action | None]]] = [{} for _ in range(num_ranks)]
    for m in range(num_microbatches):
        entry = stages * (m // num_ranks) + 2 * (m % num_ranks)
        for stage in range(stages):
            rank = slots[placement[stage]]
            rank.setdefault(entry + stage, [None, None])[0] = Action(Kind.F, stage, 0, m)
            rank.setdefault(entry + 2 * stages - 1 - stage, [None, None])[1] = Action(
                Kind.B_INPUT, stage, 0, m
            )
    return tuple(_from_slots(slots[r], r, num_ranks - 1 - r, alpha, extra) for r in range(num_ranks))


def _from_slots(
    slots: dict[int, list[Action | None]], r: int, outer: int, alpha: float, extra: int
) -> tuple[Action, ...]:
    pairs = [slot for slot in sorted(slots) if None not in slots[slot]]
    mine = [slot for slot in pairs if slot % 2 == r % 2]
    others = [slot for slot in pairs if slot % 2 != r % 2]
    split = round(alpha * outer)
    backward_first = set(mine[: max(0, outer + extra)])
    forward_first = set(others[len(others) - split :]) if split else set()
    actions: list[Action] = []
    for slot in sorted(slots):
        forward, backward = slots[slot]
        if forward is None or backward is None or slot in forward_first:
            actions += [action for action in (forward, backward) if action is not None]
        elif slot in backward_first:
            actions += [backward, forward]
        else:
            actions.append(Action.pair(forward, backward._replace(kind=Kind.B)))
    return tuple(actions)
