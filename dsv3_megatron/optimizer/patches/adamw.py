"""`megatron.core.optimizer`'s choice of Adam: `--optimizer adam` builds ours where no fused kernel runs.

Megatron picks its Adam once, by import: Transformer Engine's, else Apex's, else `torch.optim.AdamW`. The
last has no bf16 moments, and the distributed optimizer cannot load a checkpoint with it. Ours has TE's
interface, so Megatron's own path for TE is taken. The replaced function only checks that this choice still
stands.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch, PatchMismatch


def _globals() -> list[tuple[Any, str, Any]]:
    """Megatron's import-time choice: (module, global, value that selects our class)."""
    import megatron.core.optimizer as factory
    from megatron.core.optimizer import distrib_optimizer

    from dsv3_megatron.optimizer.adamw import AdamW

    return [
        (factory, "Adam", AdamW),
        (factory, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "Adam", AdamW),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_TE_OPTIMIZER", True),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", False),
    ]


def _install(original: Any) -> Any:
    for module, name, value in _globals():
        if not hasattr(module, name):
            raise PatchMismatch(f"patch 'adamw': {module.__name__} of this Megatron version has no {name}")
        setattr(module, name, value)

    @functools.wraps(original)
    def _get_megatron_optimizer_based_on_param_groups(*args: Any, **kwargs: Any) -> Any:
        for module, name, value in _globals():
            if getattr(module, name) is not value:
                raise RuntimeError(
                    f"{module.__name__}.{name} was changed after dsv3_megatron.optimizer.install()"
                )
        return original(*args, **kwargs)

    return _get_megatron_optimizer_based_on_param_groups


PATCH = Patch(
    name="adamw",
    target="megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups",
    signature=(
        "(config, model_chunks, param_groups, per_model_buffers=None, model_parallel_group=None, "
        "data_parallel_group=None, data_parallel_group_gloo=None, data_parallel_group_idx=None, "
        "intra_dist_opt_group=None, distributed_optimizer_instance_id=0, pg_collection=None, "
        "skip_megatron_wrapping=False)"
    ),
    why="--optimizer adam is our AdamW (bf16 moments, loadable checkpoints) where TE's and Apex's cannot run",
    install=_install,
)
