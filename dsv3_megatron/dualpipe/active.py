"""The schedule that is in force in this process."""

from dataclasses import dataclass, field
from typing import Any

from dsv3_megatron.dualpipe.ranks import Placement
from dsv3_megatron.pipeline.traits import TRAITS


@dataclass
class Active:
    """What `--pipeline-schedule` and its relatives have chosen; `function` is built when it is first asked for.

    `table` are further arguments of `build_schedule`.
    """

    schedule: str = "1f1b"
    placement: Placement | None = None
    timeout_s: float = 600.0
    pair_order: str = "megatron"
    max_ctas: int = 2
    table: dict[str, Any] = field(default_factory=dict)
    function: Any = None


_active = Active()


def active() -> Active:
    """What is in force; Megatron's own schedule before `activate`."""
    return _active


def activate(
    schedule: str,
    placement: Placement | None,
    timeout_s: float = 600.0,
    pair_order: str = "megatron",
    max_ctas: int = 2,
    table: dict[str, Any] | None = None,
) -> None:
    """Use a schedule (names: `pipeline.traits.TRAITS`, `arguments.PAIR_ORDERS`) for the rest of this process.

    table: further arguments of `build_schedule`.
    """
    global _active
    _active = Active(schedule, placement, timeout_s, pair_order, max_ctas, table or {})


def placement() -> Placement | None:
    """The V-shaped placement in force, None where Megatron's own holds."""
    return _active.placement


def delays_weight_gradients() -> bool:
    """Whether the schedule in force runs weight gradients apart from the backward pass."""
    return TRAITS[_active.schedule].delays_weight_gradients
