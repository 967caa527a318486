"""What a demo run has shown: read back from its TensorBoard events, summed up in one line of JSON."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Tags of dsv3_megatron.demo.worker
VAL_LOSS = "held-out loss"
SHUFFLED_LOSS = "held-out loss, context shuffled"
# Tags of Megatron
TRAIN_LOSS = "lm loss"
MTP_LOSS = "mtp_1 loss"
ITERATION_TIME = "iteration-time"

# Iterations over which noisy figures are averaged.
RECENT = 20

Curve = dict[int, float]  # iteration to value


def read_curves(folder: Path) -> dict[str, Curve]:
    """Scalars in all event files of `folder`, by tag; where a run repeated iterations, what it wrote last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, list[tuple[float, int, float]]] = {}
    for file in folder.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            curves.setdefault(tag, []).extend((e.wall_time, e.step, e.value) for e in events.Scalars(tag))
    return {tag: {step: value for _, step, value in sorted(points)} for tag, points in curves.items()}


def summarise(
    curves: Mapping[str, Curve],
    expert_load: Mapping[str, Curve],
    unigram_loss: float,
    iteration: int,
    resumed_from: int,
    tokens_per_iteration: int,
) -> dict[str, Any]:
    """The demo's result. Losses are in nats per token.

    val_loss, shuffled_context_loss: of the model after `iteration`, on the targets of unigram_loss.
    mtp_loss, max_over_mean_expert_load (mean over layers): means over the last 20 iterations of training.
    tokens_per_s: of all ranks together, by the median iteration of this run.

    Errors: LookupError if one of these was not written for this iteration.
    """
    recent = range(iteration - RECENT + 1, iteration + 1)
    loads = [statistics.mean(_values(curve, recent, tag)) for tag, curve in expert_load.items()]
    if not loads:
        raise LookupError("no expert load was logged")
    seconds = statistics.median(
        _values(curves[ITERATION_TIME], range(resumed_from + 1, iteration + 1), ITERATION_TIME)
    )
    return {
        "val_loss": _at(curves, VAL_LOSS, iteration),
        "unigram_loss": unigram_loss,
        "shuffled_context_loss": _at(curves, SHUFFLED_LOSS, iteration),
        "mtp_loss": statistics.mean(_values(curves[MTP_LOSS], recent, MTP_LOSS)),
        "tokens_per_s": tokens_per_iteration / seconds,
        "max_over_mean_expert_load": statistics.mean(loads),
        "iteration": iteration,
        "resumed_from": resumed_from,
    }


def _at(curves: Mapping[str, Curve], tag: str, iteration: int) -> float:
    curve = curves.get(tag, {})
    if iteration not in curve:
        raise LookupError(f"{tag!r} was not logged at iteration {iteration}")
    return curve[iteration]


def _values(curve: Curve, iterations: range, tag: str) -> list[float]:
    values = [curve[i] for i in iterations if i in curve]
    if not values:
        raise LookupError(f"{tag!r} was not logged in iterations {iterations.start} to {iterations.stop - 1}")
    return values


def expert_load_curves(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Expert load (maximum over mean) of each MoE layer, by tag."""
    return {tag: curve for tag, curve in curves.items() if "max_over_mean" in tag}
