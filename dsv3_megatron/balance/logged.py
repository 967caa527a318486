"""The load of each expert, from what a training run has logged (`metrics.jsonl`, docs/metrics.md)."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument

__all__ = ["read_load"]

_LARGEST = 3e38  # of fp32, in which plans are made


def read_load(
    path: Path, last: int | None = None, groups: int | None = None
) -> tuple[dict[int, list[float]], int]:
    """Tokens of each expert, layers by number, summed over the last records of a file; expert groups of the router.

    Args:
        path: a `metrics.jsonl`.
        last: records with layers that count, from the end; None: all.
        groups: said by the user, where the file need not say them.

    Raises:
        RefusedArgument: the file is missing, is not such a file, or its loads are none; names file and line.
    """
    wanted = [(line, record) for line, record in _records(path) if record.get("layers")]
    if not wanted:
        raise RefusedArgument(
            f"--load {path}: no record with MoE layers: give the metrics.jsonl of an MoE run"
        )
    total: dict[int, list[float]] = {}
    logged: set[int] = set()
    for line, record in wanted if last is None else wanted[-last:]:
        where = f"--load {path}, line {line}"
        for number, counts in _layers(record["layers"], where):
            before = total.setdefault(number, [0.0] * len(counts))
            if any(len(other) != len(counts) for other in total.values()):
                raise RefusedArgument(
                    f"{where}: {len(counts)} experts in layer {number}, others have {len(next(iter(total.values())))}: "
                    "give a file of one model"
                )
            total[number] = [a + b for a, b in zip(before, counts, strict=True)]
        logged.add(_groups(record.get("expert_groups"), where) if groups is None else groups)
    if len(logged) > 1:
        raise RefusedArgument(
            f"--load {path}: runs with {sorted(logged)} expert groups in one file: use --groups N"
        )
    return dict(sorted(total.items())), logged.pop()


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise RefusedArgument(f"--load {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RefusedArgument(f"--load {path}: not a metrics.jsonl of the trainer (not text)") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = (
                "cut off where a run was stopped? Then delete it"
                if number == len(lines) and number > 1
                else ""
            )
            raise RefusedArgument(
                f"--load {path}, line {number}: not a metrics.jsonl of the trainer: no JSON"
                + (f" ({what})" if what else "")
            ) from error
        if not isinstance(record, dict):
            raise RefusedArgument(
                f"--load {path}, line {number}: not a metrics.jsonl of the trainer: no record"
            )
        yield number, record


def _layers(layers: Any, where: str) -> Iterator[tuple[int, list[float]]]:
    """Number and tokens of each expert of each layer of a record."""
    if not isinstance(layers, dict):
        raise RefusedArgument(f'{where}: "layers" is no table of layers by number')
    for name, figures in layers.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and isinstance(figures, dict)):
            raise RefusedArgument(
                f'{where}: "layers" has an entry {name[:20]!r} that is no layer by its number'
            )
        if "tokens_per_expert" not in figures:
            raise RefusedArgument(
                f"{where}: no tokens_per_expert in layer {name}: log with --tensorboard-dir and this version"
            )
        counts = figures["tokens_per_expert"]
        if not isinstance(counts, list) or not counts:
            raise RefusedArgument(f"{where}: tokens_per_expert of layer {name} is no list of counts")
        for expert, count in enumerate(counts):
            if type(count) not in (int, float) or not 0 <= count <= _LARGEST:
                raise RefusedArgument(
                    f"{where}: expert {expert} of layer {name} has {str(count)[:20]} tokens: give counts, 0 or more"
                )
        yield int(name), counts


def _groups(said: Any, where: str) -> int:
    """A log without them is of a router without groups."""
    if said is None:
        return 1
    if type(said) is not int or not 1 <= said <= sys.maxsize:
        raise RefusedArgument(f"{where}: expert_groups {said!r} is no count: use --groups N")
    return said
