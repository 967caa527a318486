"""Costs from a measured timeline, so that the same table can be simulated with them, or another one dealt by them."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from .actions import Kind
from .simulate import Costs, Event


def fit_costs(events: Iterable[Event]) -> Costs:
    """The median duration of each kind of action, alike on all stages, and free messages.

    A backward lasts at least as long as its two halves, as `Costs` demands. What the table does not run gets what
    it would take without overlap.

    Args:
        events: a measured step, in any unit.
    """
    durations: defaultdict[Kind, list[float]] = defaultdict(list)
    for event in events:
        durations[event.action.kind].append(event.end - event.start)
    times = {kind: median(values) for kind, values in durations.items()}
    f, w = times.get(Kind.F, 0.0), times.get(Kind.W, 0.0)
    b = max(times.get(Kind.B, 0.0), times.get(Kind.B_INPUT, 0.0) + w)
    return Costs(f=f, b=b, w=w, fb=times.get(Kind.PAIR, f + b))


def fit_stage_costs(events: Iterable[Event], num_stages: int) -> Costs:
    """The same for each stage, so that a second run may deal its weight gradients by them (`write_costs`).

    What was not run of a stage gets the median of those of which it was. A pair is of two stages: what overlapping
    saved is given to both, so that `Costs` says of the pair what was measured.

    Raises:
        ValueError: no forward or no backward was measured.
    """
    durations: defaultdict[tuple[Kind, int], list[float]] = defaultdict(list)
    pairs: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for event in events:
        if event.action.backward is not None:
            pairs[event.action.stage, event.action.backward.stage].append(event.end - event.start)
        else:
            durations[event.action.kind, event.action.stage].append(event.end - event.start)

    def column(kind: Kind) -> list[float | None]:
        return [
            median(durations[kind, stage]) if (kind, stage) in durations else None
            for stage in range(num_stages)
        ]

    f, inputs, w, whole = (column(kind) for kind in (Kind.F, Kind.B_INPUT, Kind.W, Kind.B))
    f_s, w_s = _filled(f, "forward"), _filled(w, None)
    b: list[float | None] = []
    for stage in range(num_stages):
        full, half = whole[stage], inputs[stage]
        parts = None if half is None else half + w_s[stage]
        b.append(parts if full is None else full if parts is None else max(full, parts))
    b_s = [max(back, weight) for back, weight in zip(_filled(b, "backward"), w_s, strict=True)]
    saved: defaultdict[int, list[float]] = defaultdict(list)
    for (i, j), times in pairs.items():
        for stage in (i, j):
            saved[stage].append(f_s[i] + b_s[j] - median(times))
    every = [value for values in saved.values() for value in values]
    usual = median(every) if every else 0.0
    fb = [
        max(0.0, f_s[s] + b_s[s] - (sum(saved[s]) / len(saved[s]) if saved[s] else usual))
        for s in range(num_stages)
    ]
    return Costs(f=tuple(f_s), b=tuple(b_s), w=tuple(w_s), fb=tuple(fb))


def _filled(values: list[float | None], needed: str | None) -> list[float]:
    known = [value for value in values if value is not None]
    if not known and needed is not None:
        raise ValueError(f"the timeline has no {needed} alone: costs cannot be read from it")
    usual = median(known) if known else 0.0
    return [usual if value is None else value for value in values]


_NAMES = ("f", "b", "w", "fb", "p2p")


def write_costs(path: Path, costs: Costs) -> None:
    """As JSON, for `read_costs`."""
    path.write_text(json.dumps({name: getattr(costs, name) for name in _NAMES}) + "\n")


def read_costs(path: Path, num_stages: int | None = None) -> Costs:
    """The costs of a file that `write_costs` wrote, or of one written by hand: f, b, w, fb and perhaps p2p, each one
    number or one for each stage, in one unit.

    num_stages: that it must fit, where they are known.

    Raises:
        ValueError: no such file, or not such a one.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not set(_NAMES[:4]) <= set(found) <= set(_NAMES):
            raise ValueError("it needs the entries f, b, w and fb, and may have p2p and no other")
        for name, value in found.items():
            for number in value if isinstance(value, list) else (value,):
                if isinstance(number, bool) or not isinstance(number, int | float):
                    raise ValueError(f"{name} holds {json.dumps(number)}, which is no number")
        costs = Costs(
            **{
                name: tuple(map(float, value)) if isinstance(value, list) else float(value)
                for name, value in found.items()
            }
        )
        if not any(any(found[name]) if isinstance(found[name], list) else found[name] for name in _NAMES[:4]):
            raise ValueError("nothing takes time in it")
        if num_stages is not None:
            for name in _NAMES:
                costs.per_stage(name, num_stages)
        return costs
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"costs={path}: {what}; use the pipeline_stepN_costs.json that --profile-pipeline N wrote, "
            "for as many stages"
        ) from None
