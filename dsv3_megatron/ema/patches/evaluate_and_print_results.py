"""`training.evaluate_and_print_results`: `--eval-ema` evaluates the average in place of the weights."""

import functools
import inspect
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate_and_print_results(*args: Any, **kwargs: Any) -> Any:
        from dsv3_megatron.ema.trainer import evaluating

        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return evaluating(original, dict(call.arguments))

    return evaluate_and_print_results


PATCH = Patch(
    name="evaluate_and_print_results",
    target="megatron.training.training:evaluate_and_print_results",
    signature=(
        "(prefix, forward_step_func, data_iterator, model, iteration, process_non_loss_data_func, config, "
        "verbose=False, write_to_tensorboard=True, non_loss_data_func=None, pg_collection=None, "
        "p2p_communicator=None)"
    ),
    why="--eval-ema: evaluations are of the average of the weights",
    install=_install,
)
