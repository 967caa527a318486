"""DualPipe and DualPipeV inside Megatron: placement, groups, data of two directions, and the schedule function.

The schedules themselves are tables in `dsv3_megatron.pipeline`; here is what a table needs around it when its stages
are Megatron model chunks. `install` puts the patches in place, which do nothing until Megatron's validation has read
`--pipeline-schedule` and `activate` is called, before any process group exists.
"""

from typing import Any

from dsv3_megatron.dualpipe.active import activate, active, delays_weight_gradients, placement
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

# What Megatron has no seam for; each is a module of `patches`.
PATCHES = (
    "initialize_model_parallel",
    "build_distributed_models",
    "is_pipeline_last_stage",
    "is_pp_last_stage",
    "get_pp_last_rank",
    "reports_loss",
    "get_forward_backward_func",
    "get_rng_state",
)


def install() -> None:
    """Install `PATCHES`; Megatron behaves as before until a schedule is activated."""
    from dsv3_megatron.dualpipe.arguments import place
    from dsv3_megatron.patching import install as install_patches
    from dsv3_megatron.training import hooks

    hooks.after_validation(place)
    install_patches(PATCHES)


def forward_backward_func() -> Any:
    """The schedule in force as Megatron's forward-backward function, None for Megatron's own."""
    now = active()
    if now.schedule == "1f1b":
        return None
    if now.function is None:
        from megatron.training import get_args

        from dsv3_megatron.dualpipe.profile import StepProfile
        from dsv3_megatron.dualpipe.schedule import PipelineSchedule
        from dsv3_megatron.training.batch import is_packed

        args = get_args()
        now.function = PipelineSchedule(
            now.schedule,
            args.pipeline_model_parallel_size,
            now.placement,
            now.timeout_s,
            now.pair_order,
            plans=not (is_packed(args) and args.mtp_num_layers),
            max_ctas=now.max_ctas,
            table=now.table,
        )
        now.function.profile = StepProfile.from_args(args)
    return now.function
