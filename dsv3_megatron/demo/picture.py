"""The loss picture of a demo run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.demo.results import MTP_LOSS, TRAIN_LOSS, VAL_LOSS, Curve, layer_expert_loads
from dsv3_megatron.files import whole


def draw(curves: Mapping[str, Curve], result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: losses (training, held-out, MTP, the unigram line, shuffled context) and expert load by
    layer.

    `curves` is as `results.read_curves` gives it, `result` as `results.summarise`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, load) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(2, 1))
    for tag, label, style in (
        (TRAIN_LOSS, "training", {"color": "tab:blue", "alpha": 0.6, "linewidth": 1}),
        (MTP_LOSS, "MTP (second next token)", {"color": "tab:green", "alpha": 0.6, "linewidth": 1}),
        (VAL_LOSS, "held-out documents", {"color": "tab:red", "marker": "o", "markersize": 4}),
    ):
        iterations = sorted(curves[tag])
        losses.plot(iterations, [curves[tag][i] for i in iterations], label=label, **style)
    losses.axhline(result["unigram_loss"], color="black", linestyle="--", label="unigram model, held-out")
    losses.plot(
        [result["iteration"]],
        [result["shuffled_context_loss"]],
        "x",
        color="tab:purple",
        label="held-out, context shuffled",
    )
    losses.set(xlabel="iteration", ylabel="loss (nats per token)", title="Losses")
    if result["resumed_from"]:
        losses.axvline(result["resumed_from"], color="grey", linewidth=0.8, label="resumed")
    losses.legend(fontsize="small")

    for layer, curve in layer_expert_loads(curves).items():
        iterations = sorted(curve)
        load.plot(iterations, [curve[i] for i in iterations], label=layer, linewidth=1)
    load.axhline(1.0, color="black", linestyle="--", linewidth=0.8)
    load.set(xlabel="iteration", ylabel="maximum over mean", title="Expert load")
    load.legend(fontsize="x-small")
    figure.tight_layout()
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    pyplot.close(figure)
