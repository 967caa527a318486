"""What a demo run has shown: read back from its TensorBoard events, summed up in one line of JSON."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Tags of dsv3_megatron.demo.worker
VAL_LOSS = "held-out loss"
SHUFFLED_LOSS = "held-out loss, context shuffled"
# Tag of Megatron
TRAIN_LOSS = "lm loss"
# Tags of dsv3_megatron.metrics
MTP_LOSS = "dsv3/mtp_loss"
TOKENS_PER_S = "dsv3/tokens_per_s"
EXPERT_LOAD = "dsv3/max_over_mean_expert_load"  # of the layer where it is largest
LAYER_EXPERT_LOAD = "experts-max_over_mean/"  # and a layer

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
    curves: Mapping[str, Curve], unigram_loss: float, iteration: int, resumed_from: int
) -> dict[str, Any]:
    """The demo's result. Losses are in nats per token.

    val_loss, shuffled_context_loss: of the model after `iteration`, on the targets of unigram_loss.
    mtp_loss, max_over_mean_expert_load (of the layer where it is largest): means over the last 20 iterations.
    tokens_per_s: of all ranks together, median over the iterations of this run.

    Errors: LookupError if one of these was not written for this iteration.
    """
    recent = range(iteration - RECENT + 1, iteration + 1)
    this_run = range(resumed_from + 1, iteration + 1)
    return {
        "val_loss": _at(curves, VAL_LOSS, iteration),
        "unigram_loss": unigram_loss,
        "shuffled_context_loss": _at(curves, SHUFFLED_LOSS, iteration),
        "mtp_loss": statistics.mean(_values(curves, MTP_LOSS, recent)),
        "tokens_per_s": statistics.median(_values(curves, TOKENS_PER_S, this_run)),
        "max_over_mean_expert_load": statistics.mean(_values(curves, EXPERT_LOAD, recent)),
        "iteration": iteration,
        "resumed_from": resumed_from,
    }


def layer_expert_loads(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Expert load (maximum over mean) by MoE layer."""
    return {
        tag.removeprefix(LAYER_EXPERT_LOAD): curve
        for tag, curve in sorted(curves.items())
        if tag.startswith(LAYER_EXPERT_LOAD)
    }


def _at(curves: Mapping[str, Curve], tag: str, iteration: int) -> float:
    curve = curves.get(tag, {})
    if iteration not in curve:
        raise LookupError(f"{tag!r} was not logged at iteration {iteration}")
    return curve[iteration]


def _values(curves: Mapping[str, Curve], tag: str, iterations: range) -> list[float]:
    values = [value for i, value in curves.get(tag, {}).items() if i in iterations]
    if not values:
        raise LookupError(f"{tag!r} was not logged in iterations {iterations.start} to {iterations.stop - 1}")
    return values
