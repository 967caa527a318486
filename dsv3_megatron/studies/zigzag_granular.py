"""Attention's and the MLP's weight gradients dealt apart: `python -m dsv3_megatron.studies.zigzag_granular`.

A zigzag defers all weight gradients of a backward together. Here each is two: attention's, which take 0.32 of the time
(187 of DeepSeek-V3's 583 million active parameters of a layer) and 0.35 of the memory (1.56 of 4.46 GiB of a stage of
four layers), and the MLP's. They wait and run apart, and where the cap forbids to defer both, attention's alone may be.
The same search over the same orders, simulated with DeepSeek's times; one JSON line per case, ms of the step.
"""

import json
from math import inf

from dsv3_megatron.pipeline.actions import Action, Kind
from dsv3_megatron.pipeline.build import build_schedule
from dsv3_megatron.pipeline.dealing import Budget, _Clock
from dsv3_megatron.pipeline.nominal import V3_COSTS, V3_DEFERRED
from dsv3_megatron.pipeline.simulate import Costs, Durations, simulate
from dsv3_megatron.pipeline.zigzag import ALPHAS, PATIENCE, _orders

MLP, ATTENTION, ONLY_ATTENTION = 0, 1, 2  # in place of a part's direction
TIME = (1 - 187 / 583, 187 / 583)
MEMORY = (1 - 1.56 / 4.46, 1.56 / 4.46)


class _Pieces(Durations):
    def duration(self, action: Action) -> float:
        if action.kind is Kind.W:
            return self.w[action.stage] * TIME[action.direction]
        if action.kind is Kind.B and action.direction == ONLY_ATTENTION:
            return self.b[action.stage] - self.w[action.stage] * TIME[ATTENTION]
        return super().duration(action)


class _GranularClock(_Clock):
    """Deals the two pieces of a weight gradient one by one."""

    durations = _Pieces

    def _run(self, rank: int, part: Action, end: float) -> int:
        stage = part.stage
        if part.kind is Kind.W:
            self.held[rank] -= self.deferred[stage] * MEMORY[part.direction]
            self.left[rank] -= self.cost.w[stage] * TIME[part.direction]
            return -1
        told = super()._run(rank, part, end)
        if part.kind is Kind.B_INPUT:
            self.waiting[rank].pop()
            self.waiting[rank] += [part._replace(direction=MLP), part._replace(direction=ATTENTION)]
        elif part.direction == ONLY_ATTENTION:
            self.held[rank] += self.deferred[stage] * MEMORY[ATTENTION]
            self.left[rank] += self.cost.w[stage] * TIME[ATTENTION]
            self.waiting[rank].append(part._replace(direction=ATTENTION))
        return told

    def _next(self, rank: int, now: float) -> tuple[Action, tuple[Action, ...]] | None:
        found = super()._next(rank, now)
        if found is None or found[0].kind is not Kind.B:
            return found
        # A backward alone is a full one where deferring all of it would pass the cap.
        stage = found[0].stage
        more = self.deferred[stage] * MEMORY[ATTENTION] - self.kept[stage]
        if self.held[rank] + more > self.cap:
            return found
        part = found[0]._replace(direction=ONLY_ATTENTION)
        return part, (part,)


def granular(num_ranks: int, num_microbatches: int, chunks: int, costs: Costs, budget: Budget) -> float:
    """The shortest makespan of the search with pieces."""
    best = inf
    for order in _orders(num_ranks, num_microbatches, chunks, ALPHAS):
        for patience in PATIENCE:
            dealt = _GranularClock(order, num_ranks * chunks, costs, budget, patience, best).run()
            best = best if dealt is None else min(best, dealt.makespan)
    return best


def main() -> None:
    for chunks, num_microbatches in ((2, 20), (2, 60), (4, 16), (4, 60), (4, 64)):
        share = 2 / chunks
        costs = Costs(**{name: value * share for name, value in V3_COSTS.items()})
        cap = 17 / share
        table = build_schedule(
            "zigzag", 8, num_microbatches, chunks=chunks, costs=costs, memory_cap=cap, deferred=V3_DEFERRED
        )
        together = simulate(table, costs).makespan
        apart = granular(8, num_microbatches, chunks, costs, Budget(cap, V3_DEFERRED))
        line: dict[str, float] = {"ranks": 8, "chunks": chunks, "microbatches": num_microbatches, "cap": 17}
        line |= {"together": together, "apart": round(apart, 1), "gain": round(1 - apart / together, 5)}
        print(json.dumps({"bench": "zigzag_granular"} | line), flush=True)


if __name__ == "__main__":
    main()
