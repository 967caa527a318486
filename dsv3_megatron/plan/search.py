"""The search's command (its mathematics: `candidates.py`): options, parameter counts, the table with its reasons."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.conf import compose
from dsv3_megatron.dryrun.start import start_megatron
from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.pipeline.build import ZIGZAG
from dsv3_megatron.plan.candidates import SCHEDULES, Candidate, Found, Space, search
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.options import Options, given, names, number, parse
from dsv3_megatron.plan.step import Plan, plan

USAGE = """usage: python -m dsv3_megatron.plan.search [best=10] [output=table|json] [NAME=VALUE ...]

Ranks layouts of a model on a cluster. NAME=VALUE: as in dsv3_megatron.plan. layout= is what the best one found is
compared with, and gives what is not varied (data, overlap of gradients). A size, schedule, recompute_modules or
placement.last_stage_extra that is given is not varied."""

_SIZES = (
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "tensor_model_parallel_size",
    "context_parallel_size",
    "micro_batch_size",
)
_DEALT = ("pipeline_zigzag_memory_cap", "pipeline_zigzag_deferred", "pipeline_costs")
_CHUNKS = "pipeline_zigzag_chunks"
_BASE_LAYOUTS = ("pp16_ep64", "pp16_ep16", "pp8_ep8")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        print(USAGE)
        return
    num_best = [text for text in words if text.startswith("best=")]
    options = parse([text for text in words if text not in num_best])
    best = int(number("best", num_best[-1].partition("=")[2], at_least=1)) if num_best else 10
    _refuse(options)
    request = Request.of(options.overrides)
    cfg = compose(request.base)
    start_megatron()
    from dsv3_megatron.plan.counting import count_parameters
    from dsv3_megatron.plan.from_config import from_config

    planned = from_config(cfg, options.load_imbalance)
    space = request.space(planned.job.sizes.num_attention_heads, cfg)
    counts = {tp: count_parameters(cfg, tp) for tp in space.tensor_model_parallel_size}
    print("searching", file=sys.stderr, flush=True)
    begun = time.perf_counter()
    found = search(planned.job, planned.gpu, counts, space, 2 * best)
    seconds = time.perf_counter() - begun
    refused = refused_by_trainer(found, request, best)
    reference = request.reference(options.load_imbalance)
    if options.output == "json":
        print(json.dumps(as_dict(found, seconds, reference)))
        return
    print(text(found, seconds, reference))
    for line in refused:
        print(line)


def _refuse(options: Options) -> None:
    """PlanError for what is said of one plan."""
    for name in given(options):
        if name not in ("output", "load_imbalance", "of_run", "overrides"):
            raise PlanError(f"{name}: the search does not take it; give it to dsv3 plan, for one layout")


def _any_layout(overrides: list[str]) -> str:
    """A layout that the model, cluster and batch allow; only what is not varied is taken from it."""
    for layout in _BASE_LAYOUTS:
        try:
            compose([f"layout={layout}", *overrides])
        except RefusedArgument:
            continue
        return layout
    raise PlanError(
        f"none of layout={', '.join(_BASE_LAYOUTS)} divides this job: name a layout that does, layout=…"
    )


@dataclass(frozen=True)
class Request:
    """The command line, taken apart.

    Attributes:
        given: override name to value.
        base: overrides of the configuration whose batch, model and precision are kept.
    """

    given: dict[str, str]
    base: list[str]

    @classmethod
    def of(cls, overrides: list[str]) -> "Request":
        given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in overrides}
        varied = {
            *_SIZES,
            "schedule",
            _CHUNKS,
            "recompute_modules",
            "recompute_granularity",
            "placement.last_stage_extra",
        }
        for name in _DEALT:
            if name in given:
                raise PlanError(f"{name}={given[name]}: the search deals a zigzag itself; leave it out")
        base = [word for word in overrides if word.partition("=")[0].lstrip("+") not in varied]
        if "layout" not in given:
            base.insert(0, f"layout={_any_layout(base)}")
        return cls(given, base)

    def space(self, num_heads: int, cfg: Any) -> Space:
        """What is varied: all that was not given."""
        fixed: dict[str, Any] = {
            name: (int(number(name, self.given[name])),) for name in _SIZES if name in self.given
        }
        if "schedule" in self.given:
            fixed["schedule"] = tuple(s for s in SCHEDULES if s[0] == self.given["schedule"])
            if not fixed["schedule"]:
                known = ", ".join(dict.fromkeys(name for name, _ in SCHEDULES))
                raise PlanError(f"schedule={self.given['schedule']}: no such schedule; use one of {known}")
        if _CHUNKS in self.given:
            chunks = int(number(_CHUNKS, self.given[_CHUNKS]))
            among = fixed.get("schedule", SCHEDULES)
            fixed["schedule"] = tuple(s for s in among if s[0] != ZIGZAG or s[1] == chunks)
            if (ZIGZAG, chunks) not in fixed["schedule"]:
                raise PlanError(f"{_CHUNKS}={chunks}: use schedule=zigzag with 2 or 4, or leave it out")
        if "recompute_modules" in self.given:
            fixed["recompute_modules"] = (names(self.given["recompute_modules"]),)
        if "placement.last_stage_extra" in self.given:
            fixed["last_stage_extra"] = (int(self.given["placement.last_stage_extra"]),)
        space = Space(**fixed)
        sizes = tuple(
            tp
            for tp in space.tensor_model_parallel_size
            if num_heads % tp == 0 and tp <= cfg.cluster.gpus_per_node
        )
        return Space(**(vars(space) | {"tensor_model_parallel_size": sizes}))

    def reference(self, load_imbalance: float | None) -> tuple[str, Plan] | None:
        """The plan of the layout that was named, under DualPipe if no schedule was, else None."""
        from dsv3_megatron.plan.from_config import from_config

        if "layout" not in self.given:
            return None
        words = [f"{name}={value}" for name, value in self.given.items()]
        if "schedule" not in self.given:
            words.append("schedule=dualpipe")
        planned = from_config(compose(words), load_imbalance)
        return " ".join(words), plan(planned.job, planned.gpu, planned.counts)


def refused_by_trainer(found: Found, request: Request, num_best: int) -> list[str]:
    """Keeps the `num_best` fastest that the trainer would start; one line for each faster one that it refuses."""
    from dsv3_megatron.plan.from_config import validated

    lines: list[str] = []
    kept: list[tuple[Plan, Candidate]] = []
    for result, candidate in found.best:
        if len(kept) == num_best:
            break
        try:
            validated(compose(request.base + candidate.overrides()))
            kept.append((result, candidate))
        except RefusedArgument as error:
            lines.append(f"refused by the trainer: {_row(result, candidate)}: {error}")
    found.best = kept
    return lines


def _row(result: Plan, candidate: Candidate) -> str:
    layout, job = result.job.layout, result.job
    schedule = layout.schedule + (f" ×{layout.num_model_chunks}" if layout.num_model_chunks > 1 else "")
    schedule += layout.dealt_by
    return (
        f"{result.step_s:7.2f} {result.tokens_per_s_per_gpu:6.0f} {result.bubble_s:6.2f} "
        f"{max(result.memory_gib):6.1f}  TP{layout.tp} CP{layout.cp} PP{layout.pp} EP{layout.ep} DP{layout.dp} "
        f"micro {job.micro_batch_size}  {schedule}  "
        f"extra {candidate.last_stage_extra}  {','.join(sorted(job.recompute)) or 'no recompute'}"
    )


def text(found: Found, seconds: float, reference: tuple[str, Plan] | None) -> str:
    """The ranked table, why the others are not in it, and the verdict on the layout that was named."""
    lines = [" step, s  tok/s idle, s    GiB  layout"]
    lines += [_row(result, candidate) for result, candidate in found.best] or ["none fits"]
    lines.append(
        f"\n{found.num_candidates} candidates in {seconds:.1f} s, {found.num_simulated} simulated. Refused:"
    )
    for reason, (count, example) in sorted(found.refused.items(), key=lambda item: -item[1][0]):
        lines.append(f"{count:7}  {reason}; {example}")
    if reference is not None and found.best:
        name, published = reference
        best = found.best[0][0].step_s
        gain = published.step_s / best - 1
        verdict = f"{gain:.1%} faster is predicted" if gain > 0.001 else "nothing faster is predicted"
        lines.append(f"\n{name}: {published.step_s:.2f} s; best found: {best:.2f} s, {verdict}")
    if found.best:
        lines.append("\nbest: " + " ".join(found.best[0][1].overrides()))
    return "\n".join(lines)


def as_dict(found: Found, seconds: float, reference: tuple[str, Plan] | None) -> dict[str, Any]:
    """For output=json."""
    return {
        "best": [
            {
                "overrides": candidate.overrides(),
                "step_s": result.step_s,
                "tokens_per_s_per_gpu": result.tokens_per_s_per_gpu,
                "bubble_s": result.bubble_s,
                "memory_gib": result.memory_gib,
            }
            for result, candidate in found.best
        ],
        "num_candidates": found.num_candidates,
        "num_simulated": found.num_simulated,
        "seconds": seconds,
        "refused": {
            reason: {"count": n, "example": example} for reason, (n, example) in found.refused.items()
        },
        "reference_step_s": None if reference is None else reference[1].step_s,
    }


if __name__ == "__main__":
    main()
