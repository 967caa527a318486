"""From a composed configuration to the arguments of `dsv3_megatron.train`."""

import argparse
import functools
import shlex
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from dsv3_megatron.conf.compose import SECTIONS, groups
from dsv3_megatron.conf.errors import ConfigError, nearest

DEVICES = ("cuda", "cpu")  # the first is the trainer's default


@functools.cache
def parser() -> argparse.ArgumentParser:
    """Megatron's own parser with the arguments of dsv3_megatron.train added; it raises `RefusedArgument`."""
    from dsv3_megatron.arguments import megatron_parser

    return megatron_parser()


@functools.cache
def options() -> dict[str, tuple[str, argparse.Action]]:
    """Name in the configuration (`no_rope_fusion`) to option string (`--no-rope-fusion`) and its action."""
    return {
        option.lstrip("-").replace("-", "_"): (option, action)
        for action in parser()._actions
        for option in action.option_strings
        if not isinstance(action, argparse._HelpAction)
    }


def to_argv(cfg: DictConfig) -> list[str]:
    """The argument list of `dsv3_megatron.train` for a composed configuration, checked by Megatron's own
    parser.

    `true` gives a flag without value, `false` and `null` give nothing (or `--no-x` where Megatron has one
    beside
    `--x`), a list gives several values. `--device` comes first.

    Errors: ConfigError naming the unknown argument and the nearest valid one, RefusedArgument with the value
    that the parser cannot read.
    """
    device = cfg.get("device") or DEVICES[0]
    if device not in DEVICES:
        raise ConfigError(f"device={device}: use device={' or device='.join(DEVICES)}")
    return [*(["--device", device] if device != DEVICES[0] else []), *to_megatron_argv(cfg)]


def to_megatron_argv(cfg: DictConfig) -> list[str]:
    """`to_argv` without `--device`, which the trainer takes before Megatron parses the rest."""
    argv: list[str] = []
    missing = [name for name in map(str, cfg) if OmegaConf.is_missing(cfg, name)]
    if missing:
        raise ConfigError(f"{missing[0]}: this recipe needs a value, {missing[0]}=…")
    for name, value in cfg.items():
        if name not in SECTIONS and name != "device" and value is not None:
            argv += _argument(str(name), value)
    parser().parse_args(argv)
    return argv


def to_command(cfg: DictConfig) -> str:
    """The `torchrun` line, run on each node, that starts the same training without Hydra.

    More than one node meets at `$MASTER_ADDR:$MASTER_PORT`.
    """
    cluster = cfg.cluster
    launch = ["torchrun", "--nnodes", str(cluster.nodes), "--nproc-per-node", str(cluster.gpus_per_node)]
    if cluster.nodes > 1:
        launch += [
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "dsv3",
            "--rdzv-endpoint",
            '"$MASTER_ADDR:$MASTER_PORT"',
        ]
    return f"{' '.join(launch)} -m dsv3_megatron.train {shlex.join(to_argv(cfg))}"


def _argument(name: str, value: Any) -> list[str]:
    from dsv3_megatron.arguments.command_line import choices_of

    if name not in options():
        raise ConfigError(f"{name}={value}: no such argument{_hint(name)}")
    option, action = options()[name]
    if isinstance(value, ListConfig):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict | DictConfig):
        raise ConfigError(f"{name}: takes a value, not entries")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value}: is a flag, use {name}=true or {name}=false")
        if value:
            return [option]
        return [f"--no-{option[2:]}"] if isinstance(action, argparse.BooleanOptionalAction) else []
    values = value if isinstance(value, list) else [value]
    if (known := choices_of(action)) is not None:
        for item in values:
            if item not in known:
                choices = [str(choice) for choice in known]
                raise ConfigError(
                    f"{name}={item}: not possible{nearest(str(item), choices)}"
                    f" Available: {', '.join(choices)}"
                )
    if len(values) > 1 and action.nargs in (None, "?"):
        raise ConfigError(f"{name}={values}: takes one value")
    texts = [str(item) for item in values]
    # A value that begins with a hyphen would read as an option.
    if len(texts) == 1 and texts[0].startswith("-"):
        return [f"{option}={texts[0]}"]
    return [option, *texts]


def _hint(name: str) -> str:
    for flag, action in _flags_named_otherwise():
        if action.dest == name:
            return f"; the command line calls it {flag}"
    from dsv3_megatron.arguments.foreign import foreign_options, hint

    option = "--" + name.replace("_", "-")
    if option in foreign_options():
        return f": {hint(option, parser())}"
    for section, entries in SECTIONS.items():
        if name in entries:
            return f"; did you mean '{section}.{name}'?"
    return nearest(name, [*options(), "device", *groups()])


def _flags_named_otherwise() -> Iterator[tuple[str, argparse.Action]]:
    """Arguments whose attribute in Megatron's args differs from their name (`no_rope_fusion`,
    `apply_rope_fusion`).
    """
    return ((name, action) for name, (_, action) in options().items() if action.dest != name)
