"""Weight gradients dealt into a given order of forwards and backwards, by simulating it under a cap on memory.

The order says which rank runs which forwards and backwards, and which of them as pairs. Here its clock runs: each time
a rank is free it looks at its next action and runs that, or the oldest weight gradients that wait, or nothing.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from .actions import Action, Kind
from .simulate import Costs, Durations

FAR = 0.6  # in forwards: a pair is split when one of its halves is ready and the other is farther away


@dataclass(frozen=True)
class Budget:
    """Memory of a rank, in any unit; the default one is the activations of a microbatch in one stage.

    Attributes:
        cap: the most that a rank may hold.
        deferred: between an input-only backward and its weight gradients; a number, or one for each stage.
        kept: between a forward and its backward, likewise.
    """

    cap: float
    deferred: float | tuple[float, ...] = 1.0
    kept: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        for name in ("cap", "deferred", "kept"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if not 0 <= number < inf:
                    option = "memory_cap" if name == "cap" else name
                    raise ValueError(f"{option}={number} is no amount of memory; use a finite number ≥ 0")

    def per_stage(self, name: str, num_stages: int) -> tuple[float, ...]:
        """`kept` or `deferred`, one number for each stage."""
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return (value,) * num_stages
        if len(value) != num_stages:
            raise ValueError(f"{name} has {len(value)} entries, but there are {num_stages} stages")
        return value

    def peaks(self, ranks: Sequence[Sequence[Action]], num_stages: int) -> tuple[float, ...]:
        """The most that each rank of a table holds, waiting weight gradients counted; a pair's forward comes first."""
        kept, deferred = (self.per_stage(name, num_stages) for name in ("kept", "deferred"))
        peaks = []
        for actions in ranks:
            held = peak = 0.0
            for action in actions:
                for part in action.parts:
                    held += _change(part, kept, deferred)
                    peak = max(peak, held)
            peaks.append(peak)
        return tuple(peaks)


def _change(part: Action, kept: Sequence[float], deferred: Sequence[float]) -> float:
    stage = part.stage
    match part.kind:
        case Kind.F:
            return kept[stage]
        case Kind.B:
            return -kept[stage]
        case Kind.W:
            return -deferred[stage]
    return deferred[stage] - kept[stage]


@dataclass(frozen=True)
class Deal:
    """A complete table and what it takes under the costs that it was dealt by."""

    ranks: tuple[tuple[Action, ...], ...]
    makespan: float


def deal(
    order: Sequence[Sequence[Action]],
    num_stages: int,
    costs: Costs,
    budget: Budget,
    patience: float,
    limit: float = inf,
) -> Deal | None:
    """Run an order and put its weight gradients where there is time for them.

    A free rank looks at its next action:

    - a pair of which one half is ready and the other farther than `FAR` forwards away is split, the ready half first
      (a forward only under the cap);
    - what is ready runs; where it would pass the cap, the oldest weight gradients run first, and where none wait an
      input-only backward becomes a full one, which passes nothing;
    - what is not ready lets the oldest weight gradients run, unless the wait is known to be shorter than `patience` of
      them.

    Returns:
        None where the cap stops the ranks, or the makespan would not be below `limit`.
    """
    return _Clock(order, num_stages, costs, budget, patience, limit).run()


class _Clock:
    durations = Durations

    def __init__(
        self,
        order: Sequence[Sequence[Action]],
        num_stages: int,
        costs: Costs,
        budget: Budget,
        patience: float,
        limit: float,
    ) -> None:
        self.cost = self.durations(costs, num_stages)
        self.kept, self.deferred = (budget.per_stage(name, num_stages) for name in ("kept", "deferred"))
        self.cap = budget.cap * (1 + 1e-12)
        self.patience = patience
        self.limit = limit
        self.last = num_stages - 1
        self.near = 1e-9 * max(self.cost.f)  # times closer than this are one
        self.todo = [deque((action, action.parts) for action in actions) for actions in order]
        self.table: list[list[Action]] = [[] for _ in order]
        self.waiting: list[deque[Action]] = [deque() for _ in order]
        self.held = [0.0] * len(order)
        self.free_at = [0.0] * len(order)
        self.forward: dict[tuple[int, int], tuple[float, int]] = {}  # stage and microbatch: known end, rank
        self.backward: dict[tuple[int, int], tuple[float, int]] = {}
        self.moments: list[tuple[float, int]] = []  # when a rank is free, or an input of its arrives
        self.rank_of = {part.stage: rank for rank, own in enumerate(order) for a in own for part in a.parts}
        self.beside = self._beside()
        # At least this much work of each rank is left: it cannot end before.
        self.left = [
            sum(
                self.beside if part.kind is Kind.F else self.cost.b[part.stage]
                for a in own
                for part in a.parts
            )
            for own in order
        ]

    def run(self) -> Deal | None:
        for rank in range(len(self.todo)):
            heapq.heappush(self.moments, (0.0, rank))
        end = 0.0
        while self.moments:
            now = self.moments[0][0]
            looking: list[int] = []  # ranks that have something new to look at, in their order
            while self.moments and self.moments[0][0] <= now + self.near:
                looking.append(heapq.heappop(self.moments)[1])
            looking = sorted(set(looking))
            while looking:  # what one rank starts tells another when its input comes
                again: set[int] = set()
                for rank in range(looking[0], len(self.todo)):
                    if rank not in looking or self.free_at[rank] > now + self.near:
                        continue
                    found = self._next(rank, now)
                    if found is None:
                        continue
                    action, parts = found
                    self.table[rank].append(action)
                    self.free_at[rank] = now + self.cost.duration(action)
                    end = max(end, self.free_at[rank])
                    heapq.heappush(self.moments, (self.free_at[rank], rank))
                    for part in parts:
                        told = self._run(rank, part, self.free_at[rank])
                        if told > rank:
                            looking.append(told)
                        elif told >= 0:
                            again.add(told)
                    if max(end, self.free_at[rank] + self.left[rank]) >= self.limit:
                        return None
                looking = sorted(again)
        if any(self.todo) or any(self.waiting):
            return None
        return Deal(tuple(map(tuple, self.table)), end)

    def _run(self, rank: int, part: Action, end: float) -> int:
        """Book a part that ends then; returns the rank that now knows when an input of its comes, or −1."""
        kind, stage, _, microbatch, _ = part
        if kind is Kind.W:
            self.held[rank] -= self.deferred[stage]
            self.left[rank] -= self.cost.w[stage]
            return -1
        if kind is Kind.F:
            self.held[rank] += self.kept[stage]
            self.left[rank] -= self.beside
            self.forward[stage, microbatch] = (end, rank)
            stage, edge = stage + 1, stage
        else:
            self.held[rank] -= self.kept[stage]
            self.left[rank] -= self.cost.b[stage]
            if kind is Kind.B_INPUT:
                self.held[rank] += self.deferred[stage]
                self.left[rank] += self.cost.w[stage]
                self.waiting[rank].append(part)
            self.backward[stage, microbatch] = (end, rank)
            stage = edge = stage - 1
        if not 0 <= stage <= self.last:
            return -1
        other = self.rank_of[stage]
        heapq.heappush(self.moments, (end + (0.0 if other == rank else self.cost.p2p[edge]), other))
        return other

    def _beside(self) -> float:
        """What a forward adds to a backward beside it, at least."""
        c = self.cost
        stages = range(self.last + 1)
        saved = max(c.f[s] + c.b[s] - c.fb[s] for s in stages)
        return max(0.0, min(c.f) - max(0.0, saved))

    def _arrival(self, rank: int, part: Action) -> float:
        """When the input of a forward or backward is there; infinite while nobody has begun it."""
        stage, microbatch = part.stage, part.microbatch
        if part.kind is Kind.F:
            return 0.0 if stage == 0 else self._sent(self.forward, rank, stage - 1, microbatch, stage - 1)
        own = self.forward.get((stage, microbatch), (inf, rank))[0]
        if stage == self.last:
            return own
        return max(own, self._sent(self.backward, rank, stage + 1, microbatch, stage))

    def _sent(self, ends: dict, rank: int, stage: int, microbatch: int, edge: int) -> float:
        found = ends.get((stage, microbatch))
        if found is None:
            return inf
        end, producer = found
        return end if producer == rank else end + self.cost.p2p[edge]

    def _next(self, rank: int, now: float) -> tuple[Action, tuple[Action, ...]] | None:
        """What a free rank runs, with its parts."""
        todo, waiting = self.todo[rank], self.waiting[rank]
        if not todo:
            return self._weight(waiting)
        action, parts = todo[0]
        soon = now + self.near
        arrivals = [self._arrival(rank, part) for part in parts]
        last = max(arrivals)
        if len(parts) == 2 and min(arrivals) <= soon and last > soon + FAR * self.cost.f[action.stage]:
            half = self._split(rank, parts, arrivals[0] <= soon)
            if half is not None:
                return half
        if last > soon:
            if waiting and last - now >= self.patience * self.cost.w[waiting[0].stage] - self.near:
                return self._weight(waiting)
            return None
        if self.held[rank] + _change(parts[0], self.kept, self.deferred) <= self.cap:
            return todo.popleft()
        if waiting:
            return self._weight(waiting)
        if action.kind is not Kind.B_INPUT:
            return None
        todo.popleft()
        full = action._replace(kind=Kind.B)
        return full, (full,)

    @staticmethod
    def _weight(waiting: deque[Action]) -> tuple[Action, tuple[Action, ...]] | None:
        if not waiting:
            return None
        weight = waiting.popleft()._replace(kind=Kind.W)
        return weight, (weight,)

    def _split(
        self, rank: int, parts: tuple[Action, ...], forward_first: bool
    ) -> tuple[Action, tuple[Action, ...]] | None:
        """The ready half of a pair, the other one standing next; None where the cap forbids it."""
        halves = [parts[0], parts[1]._replace(kind=Kind.B_INPUT)]
        if not forward_first:
            halves.reverse()
        if self.held[rank] + _change(halves[0], self.kept, self.deferred) > self.cap:
            return None
        self.todo[rank][0] = (halves[1], (halves[1],))
        return halves[0], (halves[0],)
