"""Costs from a measured timeline, so that the same table can be simulated with them."""

from collections import defaultdict
from collections.abc import Iterable
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
