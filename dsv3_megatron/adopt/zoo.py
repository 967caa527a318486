"""YAML model configurations of Megatron-MoE-ModelZoo: options of Megatron's as keys, under `MODEL_ARGS`."""

from collections.abc import Mapping
from pathlib import Path

import yaml

__all__ = ["model_arguments", "words"]


def model_arguments(path: Path) -> dict[str, str]:
    """Options and their values as text, in the file's order.

    Raises:
        ValueError: the file is no such configuration.
    """
    try:
        table = yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # everything stays text
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    arguments = table.get("MODEL_ARGS") if isinstance(table, dict) else None
    if not isinstance(arguments, dict):
        raise ValueError(f"{path}: has no MODEL_ARGS, as a configuration of Megatron-MoE-ModelZoo has")
    return {
        str(name): " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in arguments.items()
    }


def words(arguments: Mapping[str, str]) -> list[str]:
    """The words of a command line: `true` is a flag, `false` is nothing."""
    found = []
    for name, value in arguments.items():
        if value == "false":
            continue
        found.append(name)
        if value != "true":
            found += value.split()
    return found
