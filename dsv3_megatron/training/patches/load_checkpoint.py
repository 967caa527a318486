"""`training.load_checkpoint`: functions can be called around it and once it is done (`dsv3_megatron.training.hooks`).

What else belongs to a checkpoint is loaded there: the average of the weights, the learning-rate schedule without the
optimizer.
"""

import functools
import inspect
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        from dsv3_megatron.training import hooks

        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        with hooks.loading(call.arguments):
            iteration, flops = original(*call.args, **call.kwargs)
        hooks.loaded(dict(call.arguments), iteration)
        return iteration, flops

    return load_checkpoint


PATCH = Patch(
    name="load_checkpoint",
    target="megatron.training.training:load_checkpoint",
    signature=(
        "(ddp_model, optimizer, opt_param_scheduler, load_arg='load', strict=True, checkpointing_context=None, "
        "skip_load_to_model_and_opt=False, tp_group=None, pp_group=None, dp_cp_group=None, dp_group=None, "
        "expt_dp_group=None, rng_state_key_prefix='')"
    ),
    why="what belongs to a checkpoint is loaded with it: the average of the weights, the learning-rate schedule",
    install=_install,
)
