"""What a table asks of each rank, counted once: fast sums in place of a walk and a simulation per candidate."""

from collections import Counter
from dataclasses import dataclass

from dsv3_megatron.pipeline import Costs, Kind, Schedule
from dsv3_megatron.pipeline.comms import receives
from dsv3_megatron.plan.activations import Footprint

# Microbatches kept and deferred of each of the rank's stages, and what runs (F, B or W) of which of them.
Moment = tuple[tuple[int, ...], tuple[int, ...], str, int]


@dataclass(frozen=True)
class RankProfile:
    """One rank of a table.

    Attributes:
        stages: it holds.
        moments: (kept, deferred, what runs) at which memory can be highest; others hold less of everything.
        actions: how often it runs (kind, stage, stage of a pair's backward or −1).
        channels: on which it receives messages.
    """

    stages: tuple[int, ...]
    moments: tuple[Moment, ...]
    actions: tuple[tuple[Kind, int, int, int], ...]
    channels: int

    def memory(self, footprints: list[Footprint]) -> float:
        """Most bytes of microbatches: what `memory.plan_memory` finds by walking."""
        sizes = [footprints[stage] for stage in self.stages]
        most = 0.0
        for kept, deferred, what, index in self.moments:
            live = sum(n * f.kept + d * f.deferred for n, d, f in zip(kept, deferred, sizes, strict=True))
            own = sizes[index]
            extra = {"F": own.forward, "B": own.backward, "W": own.kept}[what] - own.kept
            most = max(most, live + extra)
        return most

    def busy(self, costs: Costs, num_stages: int) -> float:
        """Seconds of all its actions: a step cannot be shorter."""
        f, b, w, fb = (costs.per_stage(name, num_stages) for name in ("f", "b", "w", "fb"))
        total = 0.0
        for kind, i, j, times in self.actions:
            if kind is Kind.PAIR:
                saved = (f[i] + b[i] - fb[i] + f[j] + b[j] - fb[j]) / 2
                total += times * (fb[i] if fb[i] == fb[j] else max(f[i] + b[j] - saved, f[i], b[j]))
            elif kind is Kind.F:
                total += times * f[i]
            elif kind is Kind.W:
                total += times * w[i]
            else:
                total += times * (b[i] - (w[i] if kind is Kind.B_INPUT else 0))
        return total


def profile(schedule: Schedule) -> tuple[RankProfile, ...]:
    """Every rank of the table."""
    return tuple(_rank(schedule, rank) for rank in range(schedule.num_ranks))


def _rank(schedule: Schedule, rank: int) -> RankProfile:
    stages = tuple(sorted({stage for stage, _ in schedule.stages_of(rank)}))
    index = {stage: i for i, stage in enumerate(stages)}
    kept, deferred = [0] * len(stages), [0] * len(stages)
    seen: set[Moment] = set()
    for action in schedule.ranks[rank]:
        for part in action.parts:
            i = index[part.stage]
            if part.kind is Kind.F:
                kept[i] += 1
                seen.add((tuple(kept), tuple(deferred), "F", i))
            elif part.kind is Kind.W:
                seen.add((tuple(kept), tuple(deferred), "W", i))
                deferred[i] -= 1
            else:
                seen.add((tuple(kept), tuple(deferred), "B", i))
                kept[i] -= 1
                deferred[i] += part.kind is Kind.B_INPUT
                seen.add((tuple(kept), tuple(deferred), "W", i))
    counted = Counter(
        (action.kind, action.stage, action.backward.stage if action.backward else -1)
        for action in schedule.ranks[rank]
    )
    actions = tuple((kind, i, j, times) for (kind, i, j), times in counted.items())
    channels = {message.channel for action in schedule.ranks[rank] for message in receives(schedule, action)}
    return RankProfile(stages, tuple(_highest(seen)), actions, len(channels))


def _highest(moments: set[Moment]) -> list[Moment]:
    """Without those that hold no more of anything than another of the same kind."""
    result = []
    for one in moments:
        dominated = any(
            other != one
            and other[2:] == one[2:]
            and all(a <= b for a, b in zip(one[0] + one[1], other[0] + other[1], strict=True))
            for other in moments
        )
        if not dominated:
            result.append(one)
    return result
