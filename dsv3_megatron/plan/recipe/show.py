"""A picture, table or values of a recipe's schedules.

    python -m dsv3_megatron.plan.recipe.show recipe=v3_pretrain tokens=14.8e12 "at=[5e12,14.4e12]" output=json

`output`: `json` (the last line: {"at": [{"tokens", "lr", "batch", "gamma", "mtp_weight"}, …]}), `table`, or `png`
(written to `file`, by default ‹recipe›.png). Without `at` the borders of the schedules are shown. Further words are
overrides of dsv3_megatron.train_hydra, for instance lr=1e-3.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dsv3_megatron.conf import ConfigError, compose
from dsv3_megatron.errors import exits_cleanly
from dsv3_megatron.plan.recipe.constant import ConstantSchedules
from dsv3_megatron.recipe.arguments import schedules_of
from dsv3_megatron.recipe.schedules import Schedules

OUTPUTS = ("json", "table", "png")
COLUMNS = ("tokens", "lr", "batch", "gamma", "mtp_weight")


@exits_cleanly
def main(words: Sequence[str] | None = None) -> None:
    """Show what the words ask for; RefusedArgument for a wrong one."""
    words = list(sys.argv[1:] if words is None else words)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    options, overrides = _split(words)
    output = options.get("output", "table")
    if output not in OUTPUTS:
        raise ConfigError(f"output={output}: use output={' or output='.join(OUTPUTS)}")
    recipe = options.get("recipe", "v3_pretrain")
    # One process, so that no batch is refused for its division.
    cfg = compose(["layout=cpu_single", f"recipe={recipe}", *overrides])
    schedules = schedules_from(cfg, options.get("tokens"))
    borders = {name: samples * schedules.seq_length for name, samples in schedules.borders().items()}
    tokens = _numbers(options["at"]) if "at" in options else sorted(set(borders.values()))
    for count in tokens:
        if not 0 <= count <= borders["end"]:
            raise ConfigError(f"at={count:g}: the run has {borders['end']:g} tokens")
    values = [schedules.at(count) for count in tokens]
    if output == "json":
        print(json.dumps({"at": values}))
    elif output == "table":
        print(table(values, {count: name for name, count in reversed(borders.items())}))
    else:
        from dsv3_megatron.plan.recipe.picture import draw

        file = Path(options.get("file", f"{recipe}.png"))
        draw(schedules, recipe, file)
        print(file)


def schedules_from(cfg: DictConfig, tokens: str | None) -> Schedules | ConstantSchedules:
    """The schedules of a composed configuration, over `tokens` if given."""
    if cfg.get("train_tokens") is None:
        if tokens is not None:
            raise ConfigError(f"tokens={tokens}: this recipe has its own length; leave it out")
        return ConstantSchedules.from_config(cfg)
    cfg.train_tokens = int(_number(str(tokens or cfg.train_tokens), "tokens"))
    schedules = schedules_of(cfg)
    assert schedules is not None
    try:
        _ = schedules.ramp
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return schedules


def table(values: Sequence[dict[str, Any]], names: dict[int, str]) -> str:
    """One line per entry of `values` (as `Schedules.at` gives them), with what happens there."""
    rows = [
        (
            f"{v['tokens'] / 1e9:,.3f}B",
            f"{v['lr']:.4g}",
            str(v["batch"]),
            f"{v['gamma']:g}",
            f"{v['mtp_weight']:g}",
        )
        for v in values
    ]
    lines = ["{:>14} {:>10} {:>7} {:>7} {:>11}  {}".format(*COLUMNS, "")]
    for row, value in zip(rows, values, strict=True):
        lines.append("{:>14} {:>10} {:>7} {:>7} {:>11}  {}".format(*row, names.get(value["tokens"], "")))
    return "\n".join(line.rstrip() for line in lines)


def _split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options, and the overrides of the configuration."""
    options: dict[str, str] = {}
    overrides = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in ("recipe", "tokens", "at", "output", "file"):
            options[name] = value
        else:
            overrides.append(word)
    return options, overrides


def _numbers(text: str) -> list[int]:
    inside = text.strip().removeprefix("[").removesuffix("]")
    return [int(_number(part.strip(), "at")) for part in inside.split(",")]


def _number(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number < 0 or number != int(number):
        raise ConfigError(f"{name}={text}: write a whole number of tokens, for instance {name}=14.8e12")
    return number


if __name__ == "__main__":
    main()
