"""The planner's own NAME=VALUE options, apart from the trainer's overrides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dsv3_megatron.plan.job import CROSS_ENTROPIES, GRAPHED, SOFTWARE_FLAGS, PlanError

# Of a launch line's machines, where it does not say.
SIZES = ("gpu", "nodes", "gpus_per_node")
SOFTWARE = "software."


@dataclass
class Options:
    """What the command line says of the plan itself.

    Attributes:
        output: "table" or "json".
        tokens, price: of the cost; dollars per GPU-hour, None for DeepSeek's.
        load_imbalance: tokens of the fullest expert-parallel rank against the mean; None: see `from_args.job_of`.
        pictures: folder for pictures and traces, None for none.
        measured: a timeline that `--profile-pipeline` wrote, laid over the predicted one.
        launch, script: a launch line, a shell script with one, None for a configuration.
        said: of the launch's machines (`gpu`, `nodes`, `gpus_per_node`); with a script also variables for it.
        whatif: changes of the hardware to plan with (`whatif.py`).
        anchor: a file with one measured run (`anchor.py`).
        proxy: print the proxy to measure.
        software: of the run, what no argument says (`job.Software`).
        of_run: the words of `load_imbalance` and `software`, as they were typed.
        overrides: everything else, for `dsv3_megatron.conf.compose`.
    """

    output: str = "table"
    tokens: float | None = None
    price: float | None = None
    load_imbalance: float | None = None
    pictures: Path | None = None
    measured: Path | None = None
    launch: str | None = None
    script: Path | None = None
    said: dict[str, str] = field(default_factory=dict)
    whatif: tuple[str, ...] | None = None
    anchor: Path | None = None
    proxy: bool = False
    software: dict[str, Any] = field(default_factory=dict)
    of_run: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)


_LINES = ("--launch", "--script")
# What describes the job, not what is done with its plan.
OF_JOB = ("launch", "script", "said", "load_imbalance", "software", "of_run", "overrides")


def parse(argv: Sequence[str]) -> Options:
    """PlanError names the option, its value and what to use."""
    options = Options()
    words = list(argv)
    while words:
        text = words.pop(0)
        name, equals, value = text.partition("=")
        if name in _LINES:
            if not equals:
                value = words.pop(0) if words else ""
            if not value.strip():
                raise PlanError(
                    f"{name}: needs a {'launch line in quotes' if name == '--launch' else 'file'}"
                )
            setattr(options, name[2:], value if name == "--launch" else Path(value))
        elif name == "--proxy":
            if equals:
                raise PlanError(f"{text}: --proxy takes no value; use --proxy")
            options.proxy = True
        elif name == "output":
            if value not in ("table", "json"):
                raise PlanError(f"output={value}: use output=table or output=json")
            options.output = value
        elif name in ("tokens", "price"):
            setattr(options, name, number(name, value))
        elif name == "load_imbalance":
            options.load_imbalance = number(name, value, at_least=1.0)
            options.of_run.append(text)
        elif name == "whatif":
            options.whatif = names(value)
        elif name.startswith(SOFTWARE):
            options.software[name.removeprefix(SOFTWARE)] = software_of(name, value)
            options.of_run.append(text)
        elif name in ("pictures", "measured", "anchor"):
            if not value:
                raise PlanError(f"{text}: a value is needed, such as {name}=runs/{name}")
            setattr(options, name, Path(value))
        else:
            options.overrides.append(text)
    _check(options)
    return options


def names(value: str) -> tuple[str, ...]:
    """Of a list: "a,b", "[a, b]"."""
    return tuple(part.strip() for part in value.strip().strip("[]").split(",") if part.strip())


def given(options: Options) -> list[str]:
    """Fields that are not as they are without a word."""
    usual = Options()
    return [
        field.name for field in fields(options) if getattr(options, field.name) != getattr(usual, field.name)
    ]


def beside_job(options: Options) -> list[str]:
    """What is said of the plan itself, as it is typed: "pictures=", "--proxy", …"""
    return ["--proxy" if name == "proxy" else f"{name}=" for name in given(options) if name not in OF_JOB]


def software_of(name: str, value: str) -> Any:
    """One field of `job.Software`, from `software.NAME=VALUE`."""
    known: dict[str, tuple[str, Callable[[str], Any]]] = {
        "te": ("a version, such as software.te=2.9", _version),
        "cross_entropy": (f"{', '.join(CROSS_ENTROPIES)} or none", _loss),
        "graphs": (f"some of {', '.join(GRAPHED)}", _graphs),
        **{flag: ("true or false", {"true": True, "false": False}.__getitem__) for flag in SOFTWARE_FLAGS},
    }
    said = name.removeprefix(SOFTWARE)
    if said not in known:
        names = ", ".join(SOFTWARE + known_name for known_name in known)
        raise PlanError(f"{name}={value}: no such property of a run's software; use {names}")
    wanted, read = known[said]
    try:
        return read(value)
    except (KeyError, ValueError):
        raise PlanError(f"{name}={value}: use {wanted}") from None


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _loss(text: str) -> str:
    return {**{name: name for name in CROSS_ENTROPIES}, "none": ""}[text]


def _graphs(text: str) -> frozenset[str]:
    parts = frozenset(names(text))
    if not parts <= set(GRAPHED):
        raise ValueError(text)
    return parts


def _check(options: Options) -> None:
    """What does not go together, and places that cannot be."""
    if options.measured is not None and options.pictures is None:
        raise PlanError(f"measured={options.measured}: give pictures=FOLDER for the picture of both")
    if options.price is not None and options.tokens is None:
        raise PlanError(
            f"price={options.price:g} without tokens=: a price is of a token budget; give tokens=14.8e12"
        )
    if options.proxy and options.output == "json":
        raise PlanError("--proxy with output=json: a recipe is words; leave one of them out")
    if options.proxy and (others := [name for name in beside_job(options) if name != "--proxy"]):
        raise PlanError(
            f"--proxy with {', '.join(others)}: a recipe has no part in them; leave one of them out"
        )
    for name in ("measured", "anchor"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise PlanError(f"{name}={path}: there is no such file; give one that exists")
    if options.launch is None and options.script is None:
        return
    if options.launch is not None and options.script is not None:
        raise PlanError("--launch with --script: two jobs; give one of them")
    for text in options.overrides:
        name, equals, value = text.partition("=")
        allowed = SIZES if options.launch is not None else None
        if not equals or (allowed is not None and name not in allowed):
            what = (
                "NAME=VALUE, a variable of the script"
                if allowed is None
                else " or ".join(f"{n}=" for n in SIZES)
            )
            raise PlanError(
                f"{text}: beside --launch or --script only {what} can be said; change the line itself"
            )
        options.said[name] = value
    options.overrides = []


_SUCH = {"tokens": "14.8e12", "load_imbalance": "1.1", "best": "10"}


def number(name: str, value: str, at_least: float | None = None) -> float:
    """A positive number, or one that is at least so large."""
    try:
        result = float(value)
    except ValueError:
        raise PlanError(
            f"{name}={value}: a number is needed, such as {name}={_SUCH.get(name, '1')}"
        ) from None
    if at_least is None and not 0 < result < float("inf"):
        raise PlanError(f"{name}={value}: a positive number is needed")
    if at_least is not None and not at_least <= result < float("inf"):
        raise PlanError(f"{name}={value}: a number of at least {at_least:g} is needed")
    return result
