"""`training.load_checkpoint`: with the weights their average (`--ema-decay`, `--eval-ema`) is loaded."""

import functools
import inspect
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        from dsv3_megatron.ema.trainer import after_load

        call = signature.bind(*args, **kwargs).arguments
        iteration, flops = original(*args, **kwargs)
        after_load(call["ddp_model"], iteration)
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
    why="--ema-decay, --eval-ema: the average of the weights is loaded with them",
    install=_install,
)
