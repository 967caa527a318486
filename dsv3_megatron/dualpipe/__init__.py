"""DualPipe and DualPipeV inside Megatron: placement, groups, data of two directions, and the schedule function.

The schedules themselves are tables in `dsv3_megatron.pipeline`; here is what a table needs around it when its stages
are Megatron model chunks. `install` puts the patches in place, which do nothing until Megatron's validation has read
`--pipeline-schedule` and `activate` is called, before any process group exists.
"""

from dataclasses import dataclass
from typing import Any

from dsv3_megatron.dualpipe.ranks import Placement

__all__ = [
    "PATCHES",
    "Placement",
    "activate",
    "delays_weight_gradients",
    "forward_backward_func",
    "install",
    "placement",
]

# What Megatron has no seam for; each is a module of dsv3_megatron.patching.
PATCHES = (
    "validate_args",
    "initialize_model_parallel",
    "build_distributed_models",
    "is_pipeline_last_stage",
    "is_pp_last_stage",
    "get_pp_last_rank",
    "reports_loss",
    "get_forward_backward_func",
    "get_rng_state",
)


@dataclass
class _Active:
    schedule: str = "1f1b"
    placement: Placement | None = None
    timeout_s: float = 600.0
    pair_order: str = "megatron"
    function: Any = None


_active = _Active()


def install() -> None:
    """Install `PATCHES`; Megatron behaves as before until a schedule is activated."""
    from dsv3_megatron.patching import install as install_patches

    install_patches(PATCHES)


def activate(
    schedule: str,
    placement: Placement | None,
    timeout_s: float = 600.0,
    pair_order: str = "megatron",
) -> None:
    """Use a schedule (names: `arguments.SCHEDULES`, `arguments.PAIR_ORDERS`) for the rest of this process."""
    global _active
    _active = _Active(schedule, placement, timeout_s, pair_order)


def placement() -> Placement | None:
    """The V-shaped placement in force, None where Megatron's own holds."""
    return _active.placement


def delays_weight_gradients() -> bool:
    """Whether the schedule in force runs weight gradients apart from the backward pass."""
    return _active.schedule != "1f1b"


def forward_backward_func() -> Any:
    """The schedule in force as Megatron's forward-backward function, None for Megatron's own."""
    if _active.schedule == "1f1b":
        return None
    if _active.function is None:
        from megatron.training import get_args

        from dsv3_megatron.dualpipe.profile import StepProfile
        from dsv3_megatron.dualpipe.schedule import PipelineSchedule
        from dsv3_megatron.training.batch import is_packed

        args = get_args()
        _active.function = PipelineSchedule(
            _active.schedule,
            args.pipeline_model_parallel_size,
            _active.placement,
            _active.timeout_s,
            _active.pair_order,
            plans=not (is_packed(args) and args.mtp_num_layers),
        )
        _active.function.profile = StepProfile.from_args(args)
    return _active.function
