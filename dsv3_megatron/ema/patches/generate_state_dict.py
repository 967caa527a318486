"""`checkpointing.generate_state_dict`: the average of the weights (`--ema-decay`) is saved with them.

Megatron makes the state that it saves and the template of what it loads here; the average is loaded by itself.
"""

import functools
import inspect
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate_state_dict(*args: Any, **kwargs: Any) -> Any:
        from dsv3_megatron.ema.trainer import add_to_checkpoint

        call = signature.bind(*args, **kwargs).arguments
        state = original(*args, **kwargs)
        if call.get("iteration") is not None:  # none where a template for loading is made
            add_to_checkpoint(state, len(call["model"]))
        return state

    return generate_state_dict


PATCH = Patch(
    name="generate_state_dict",
    target="megatron.training.checkpointing:generate_state_dict",
    signature=(
        "(args, model, optimizer, opt_param_scheduler, rng_state, iteration=None, optim_sd_kwargs=None, "
        "model_sd_kwargs=None, rerun_state=None)"
    ),
    why="--ema-decay: the average of the weights is part of the checkpoint",
    install=_install,
)
