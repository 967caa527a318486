"""DualPipe and DualPipeV inside Megatron: placement, groups, data of two directions, and the schedule function.

The schedules themselves are tables in `dsv3_megatron.pipeline`; here is what a table needs around it when its stages
are Megatron model chunks. `activate` is called once, by the argument handling, before any process group exists; the
patches of this package do nothing until then.
"""

from dsv3_megatron.dualpipe.ranks import Placement

__all__ = ["PATCHES", "Placement", "activate", "active"]

# What Megatron has no seam for; each is a module of dsv3_megatron.patching.
PATCHES = (
    "initialize_model_parallel",
    "is_pipeline_last_stage",
    "is_pp_last_stage",
    "get_pp_last_rank",
    "reports_loss",
)

_placement: Placement | None = None


def activate(placement: Placement) -> None:
    """Use a V-shaped placement for the rest of this process; installs `PATCHES`."""
    from dsv3_megatron.patching import install

    global _placement
    _placement = placement
    install(PATCHES)


def active() -> Placement | None:
    """The placement in force, None where Megatron's own holds."""
    return _placement
