"""Event simulation of a schedule: when each action starts and ends, and how long each rank stands idle."""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .actions import Action, Kind, Schedule, peak_in_flight

Cost = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Durations of the actions, in any unit; each a number, or a sequence with one number per stage.

    Attributes:
        f: forward.
        b: full backward. The input-only backward takes b − w.
        w: weight gradients alone.
        fb: overlapped pair of a forward and a full backward. Per stage, `fb[s]` is the pair of two passes of
            stage s; a pair of two stages whose `fb` differ takes f[i] + b[j] less the mean of what the two
            stages save by overlapping, but never less than the longer of the two passes.
        p2p: added to every edge between two ranks, none within a rank. Per stage, `p2p[s]` is the edge
            between stages s and s+1, both ways (the last entry is not used).

    Raises:
        ValueError: a negative cost, or w > b.
    """

    f: Cost = 1
    b: Cost = 2
    w: Cost = 1
    fb: Cost = 3
    p2p: Cost = 0

    def __post_init__(self) -> None:
        for name in ("f", "b", "w", "fb", "p2p"):
            value = getattr(self, name)
            for number in value if isinstance(value, Sequence) else (value,):
                if not 0 <= number < float("inf"):
                    raise ValueError(f"{name}={number} is not a duration; use a number ≥ 0")
        num_stages = max(len(cost) if isinstance(cost, Sequence) else 1 for cost in (self.b, self.w))
        pairs = zip(self.per_stage("b", num_stages), self.per_stage("w", num_stages), strict=True)
        for stage, (b, w) in enumerate(pairs):
            if w > b:
                raise ValueError(
                    f"w={w} exceeds b={b} (stage {stage}); b is the full backward and contains w: give "
                    "b = input-only backward + w"
                )

    def per_stage(self, name: str, num_stages: int) -> tuple[float, ...]:
        """The costs called `name`, one number for each stage."""
        value = getattr(self, name)
        if not isinstance(value, Sequence):
            return (value,) * num_stages
        values = tuple(value)
        if len(values) != num_stages:
            raise ValueError(
                f"{name} has {len(values)} entries, but there are {num_stages} stages; give one number or "
                f"{num_stages}"
            )
        return values


class Event(NamedTuple):
    """One executed action; measured timelines use the same format, in seconds from the start of the step."""

    rank: int
    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Simulation:
    """What came out of a simulation, or of a measured step.

    Attributes:
        schedule: the table that ran.
        events: all actions, by rank and then in the order of the rank's program.
    """

    schedule: Schedule
    events: tuple[Event, ...]

    @cached_property
    def makespan(self) -> float:
        """Time from the start of the step to the end of the last action on any rank."""
        return max((event.end for event in self.events), default=0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per rank, the sum of the durations of its actions."""
        busy: list[float] = [0] * self.schedule.num_ranks
        for event in self.events:
            busy[event.rank] += event.end - event.start
        return tuple(busy)

    @cached_property
    def bubble(self) -> tuple[float, ...]:
        """Per rank, makespan − busy."""
        return tuple(self.makespan - busy for busy in self.busy)

    @cached_property
    def peak_in_flight(self) -> tuple[int, ...]:
        """Per rank, the most microbatch-stages whose activations it holds (from F to B or input-only B)."""
        return tuple(peak_in_flight(actions) for actions in self.schedule.ranks)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Run `schedule` on a clock: an action starts when its rank is free and its inputs have arrived.

    Args:
        schedule: any table, also one that was not built here.
        costs: default `Costs()`: F = 1, B = 2, W = 1, F&B = 3 and free communication.

    Raises:
        ValueError: the ranks wait for each other, or for something nobody produces; the message says who for
            what.
    """
    clock = Durations(costs or Costs(), schedule.num_stages)
    last_stage = schedule.num_stages - 1
    finished: dict[
        tuple[Kind, int, int], tuple[float, int]
    ] = {}  # output of (F or B, stage, microbatch): time, rank
    waiting: defaultdict[tuple[Kind, int, int], list[int]] = defaultdict(list)
    events: list[list[Event]] = [[] for _ in schedule.ranks]
    position = [0] * schedule.num_ranks
    blocked_on: list[tuple[Kind, int, int] | None] = [None] * schedule.num_ranks

    runnable = deque(range(schedule.num_ranks))
    while runnable:
        rank = runnable.popleft()
        actions = schedule.ranks[rank]
        now = events[rank][-1].end if events[rank] else 0
        blocked_on[rank] = None
        while position[rank] < len(actions):
            action = actions[position[rank]]
            start: float = now
            for needed in _inputs(action, last_stage):
                if needed not in finished:
                    blocked_on[rank] = needed
                    break
                ready, producer = finished[needed]
                if producer != rank:
                    ready += clock.edge(needed)
                start = max(start, ready)
            if blocked_on[rank] is not None:
                waiting[blocked_on[rank]].append(rank)  # type: ignore[index]
                break
            now = start + clock.duration(action)
            events[rank].append(Event(rank, start, now, action))
            position[rank] += 1
            for part in action.parts:
                output = (Kind.B if part.kind is Kind.B_INPUT else part.kind, part.stage, part.microbatch)
                finished[output] = (now, rank)
                runnable.extend(waiting.pop(output, ()))
    stuck = [
        f"rank {rank} at {schedule.ranks[rank][position[rank]]} waits for {key[0]}{key[2]}@{key[1]}"
        for rank, key in enumerate(blocked_on)
        if key is not None
    ]
    if stuck:
        raise ValueError(f"{schedule.name} cannot finish: {'; '.join(stuck)} (written microbatch@stage)")
    return Simulation(schedule, tuple(event for per_rank in events for event in per_rank))


def _inputs(action: Action, last_stage: int) -> list[tuple[Kind, int, int]]:
    """What must be finished, here or elsewhere, before `action` starts."""
    needed = []
    for part in action.parts:
        kind, stage, _, microbatch, _ = part
        if kind is Kind.F:
            if stage > 0:
                needed.append((Kind.F, stage - 1, microbatch))
        elif kind is Kind.W:
            needed.append((Kind.B, stage, microbatch))
        else:
            needed.append((Kind.F, stage, microbatch))
            if stage < last_stage:
                needed.append((Kind.B, stage + 1, microbatch))
    return needed


class Durations:
    """`Costs` laid out per stage: how long an action takes, and an edge between two ranks."""

    def __init__(self, costs: Costs, num_stages: int) -> None:
        self.f, self.b, self.w, self.fb, self.p2p = (
            costs.per_stage(name, num_stages) for name in ("f", "b", "w", "fb", "p2p")
        )

    def duration(self, action: Action) -> float:
        stage = action.stage
        if action.backward is not None:
            return self.pair(stage, action.backward.stage)
        if action.kind is Kind.F:
            return self.f[stage]
        if action.kind is Kind.W:
            return self.w[stage]
        return self.b[stage] - (self.w[stage] if action.kind is Kind.B_INPUT else 0)

    def pair(self, i: int, j: int) -> float:
        """The pair of a forward of stage i and a backward of stage j."""
        if self.fb[i] == self.fb[j]:
            return self.fb[i]
        saved = sum(self.f[s] + self.b[s] - self.fb[s] for s in (i, j)) / 2
        return max(self.f[i] + self.b[j] - saved, self.f[i], self.b[j])

    def edge(self, output: tuple[Kind, int, int]) -> float:
        """Delay of an activation to the next stage, or of a gradient to the previous one."""
        kind, stage, _ = output
        return self.p2p[stage if kind is Kind.F else stage - 1]
