"""One line of JSON per step, and the picture of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.files import whole, write_whole

__all__ = ["JOURNAL", "PICTURE", "Journal", "draw", "read_journal"]

JOURNAL, PICTURE = "posttrain.jsonl", "posttrain.png"
_EVERY = 20  # steps between pictures


class Journal:
    """`posttrain.jsonl` in a folder, written by one rank; a resumed run goes on where its checkpoint was."""

    def __init__(self, folder: Path, first_iteration: int) -> None:
        self.folder, self.file = folder, folder / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_journal(self.file) if line["iteration"] <= first_iteration]
        write_whole(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, iteration: int, values: Mapping[str, float], last: bool) -> None:
        """A step's numbers; the picture is drawn now and then, and at the end."""
        with self.file.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if last or iteration % _EVERY == 0:
            draw(self.file, self.folder / PICTURE)


def read_journal(file: Path) -> list[dict[str, Any]]:
    """The lines; a last one that was cut off is left out."""
    lines: list[dict[str, Any]] = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


# What is drawn, where a run has it, a curve for each.
_SHOWN = (
    ("reward", "mean reward of the rollouts"),
    ("response length", "tokens per response"),
    ("loss", "preference loss"),
    ("margin", "margin β·h of the pairs"),
    ("accuracy", "share of pairs with the right order"),
    ("kl", "KL to the reference (nats per token)"),
    ("engine mismatch", "|log π trainer − log π engine|, mean"),
)


def draw(journal: Path, picture: Path) -> None:
    """Write a PNG of a journal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_journal(journal)
    shown = [(name, title) for name, title in _SHOWN if any(name in line for line in lines)]
    if not shown:
        return
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.2), squeeze=False)
    for axis, (name, title) in zip(axes[0], shown, strict=True):
        points = [(line["iteration"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set(xlabel="iteration", title=title)
        axis.title.set_fontsize("small")
    figure.tight_layout()
    with whole(picture) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    pyplot.close(figure)
