"""`megatron.training.training.train_step`: functions can be called around each step (`dsv3_megatron.training.hooks`).

Megatron reads γ and λ from the model's configuration at every step, but has no place where a schedule could set them,
and none between gradients and optimizer.
"""

import functools
import inspect
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        from dsv3_megatron.training.hooks import run_step

        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return run_step(original, dict(call.arguments))

    return train_step


PATCH = Patch(
    name="train_step",
    target="megatron.training.training:train_step",
    signature=(
        "(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, "
        "forward_backward_func, iteration=None, pg_collection=None, p2p_communicator=None)"
    ),
    why="per-step constants by schedule, averaged weights: functions called around each training step",
    install=_install,
)
