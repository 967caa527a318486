"""The planner's own NAME=VALUE options, apart from the trainer's overrides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.deepseek import DOLLARS_PER_GPU_HOUR
from dsv3_megatron.plan.job import PlanError


@dataclass
class Options:
    """What the command line says of the plan itself.

    Attributes:
        output: "table" or "json".
        tokens, price: of the cost table; dollars per GPU-hour.
        load_imbalance: tokens of the fullest expert-parallel rank against the mean.
        pictures: folder for pictures and traces, None for none.
        measured: a timeline that `--profile-pipeline` wrote, laid over the predicted one.
        overrides: everything else, for `dsv3_megatron.conf.compose`.
    """

    output: str = "table"
    tokens: float | None = None
    price: float = DOLLARS_PER_GPU_HOUR
    load_imbalance: float = LOAD_IMBALANCE
    pictures: Path | None = None
    measured: Path | None = None
    overrides: list[str] = field(default_factory=list)


def parse(argv: Sequence[str]) -> Options:
    """PlanError names the option, its value and what to use."""
    options = Options()
    for text in argv:
        name, _, value = text.partition("=")
        if name == "output":
            if value not in ("table", "json"):
                raise PlanError(f"output={value}: use output=table or output=json")
            options.output = value
        elif name in ("tokens", "price"):
            setattr(options, name, number(name, value))
        elif name == "load_imbalance":
            options.load_imbalance = number(name, value, at_least=1.0)
        elif name in ("pictures", "measured"):
            setattr(options, name, Path(value))
        else:
            options.overrides.append(text)
    if options.measured is not None and options.pictures is None:
        raise PlanError(f"measured={options.measured}: give pictures=FOLDER for the picture of both")
    return options


def number(name: str, value: str, at_least: float | None = None) -> float:
    """A positive number, or one that is at least so large."""
    try:
        result = float(value)
    except ValueError:
        raise PlanError(f"{name}={value}: a number is needed, such as {name}=14.8e12") from None
    if at_least is None and not 0 < result < float("inf"):
        raise PlanError(f"{name}={value}: a positive number is needed")
    if at_least is not None and not at_least <= result < float("inf"):
        raise PlanError(f"{name}={value}: a number of at least {at_least:g} is needed")
    return result
