"""What the long-context demonstration has shown: figures, a table, a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.studies.longctx.worker import DEPTHS, LENGTHS

LATE = 4  # the last of the position buckets, a quarter of the longest sequence
TITLES = {
    "pretrain": "trained at 256",
    "yarn1": "YaRN, first phase",
    "yarn2": "YaRN, both phases",
    "rope1": "no YaRN, first phase",
    "rope2": "no YaRN, both phases",
}

Results = Mapping[str, Mapping[str, Any]]


def late(values: list[float]) -> float:
    """Mean over the last quarter of positions."""
    return sum(values[-LATE:]) / LATE


def needles_found(result: Mapping[str, Any], length: int) -> float:
    """Share found at one length, over all depths."""
    shares = result["found"][str(length)]
    return sum(shares) / len(shares)


def summarise(results: Results) -> dict[str, Any]:
    """The last line: loss of the last quarter of 2048 positions, of all tokens and of answers; needles found there."""
    longest = LENGTHS[-1]
    summary: dict[str, Any] = {}
    for way in ("yarn", "rope"):
        result = results[f"{way}2"]
        summary[f"late_loss_{way}"] = late(result["loss"]["all"])
        summary[f"late_answer_loss_{way}"] = late(result["loss"]["answers"])
        summary[f"found_at_{longest}_{way}"] = needles_found(result, longest)
    summary["late_loss_before"] = late(results["pretrain"]["loss"]["all"])
    return summary


def table(results: Results) -> str:
    """As Markdown."""
    head = ["model", "late loss", "late loss of answers", *(f"found at {length}" for length in LENGTHS)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, title in TITLES.items():
        if name in results:
            result = results[name]
            losses = [f"{late(result['loss'][kind]):.3f}" for kind in ("all", "answers")]
            found = [f"{needles_found(result, length):.0%}" for length in LENGTHS]
            lines.append(f"| {' | '.join([title, *losses, *found])} |")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Write a PNG: needles found (length × depth) by each model, and the loss of answers by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    maps = [name for name in ("pretrain", "rope2", "yarn2") if name in results]
    figure, axes = pyplot.subplots(1, len(maps) + 1, figsize=(4 * len(maps) + 5, 4))
    for axis, name in zip(axes, maps, strict=False):
        shares = [[results[name]["found"][str(length)][i] for length in LENGTHS] for i in range(len(DEPTHS))]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(LENGTHS)), LENGTHS)
        axis.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
        axis.set(xlabel="length (tokens)", ylabel="depth of the needle", title=TITLES[name])
    figure.colorbar(image, ax=axes[len(maps) - 1], label="found")
    for name in (*maps, "rope1", "yarn1"):
        if name in results:
            losses = results[name]["loss"]["answers"]
            width = LENGTHS[-1] / len(losses)
            style = ":" if name.endswith("1") else "-"
            axes[-1].plot([(i + 0.5) * width for i in range(len(losses))], losses, style, label=TITLES[name])
    axes[-1].set(xlabel="position", ylabel="loss of answers (nats)", title="Loss by position")
    axes[-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
