"""The picture of a fine-tuning demo."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.demo.results import TRAIN_LOSS, Curve
from dsv3_megatron.files import whole


def draw(
    accuracies: Mapping[int, Mapping[str, float]],
    curves: Mapping[str, Curve],
    result: Mapping[str, Any],
    path: Path,
) -> None:
    """Write a PNG: accuracy on held-out answers by iteration, and the loss on the answers trained on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    iterations = sorted(accuracies)
    left.plot(iterations, [accuracies[i]["token_accuracy"] for i in iterations], "o-", label="tokens right")
    left.plot(
        iterations, [accuracies[i]["exact_match"] for i in iterations], "o-", label="whole answers right"
    )
    left.axhline(
        result["bigram_accuracy"], color="black", linestyle="--", label="tokens right, bigrams of the answers"
    )
    left.set(xlabel="iteration", ylabel="share", title="Held-out answers", ylim=(0, None))
    left.legend(fontsize="small")
    loss = curves[TRAIN_LOSS]
    right.plot(sorted(loss), [loss[i] for i in sorted(loss)], linewidth=1)
    right.set(xlabel="iteration", ylabel="loss (nats per answer token)", title="Training loss")
    figure.tight_layout()
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    pyplot.close(figure)
