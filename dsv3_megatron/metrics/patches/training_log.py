"""`megatron.training.training.training_log`: our metrics are reported whenever Megatron logs a step."""

import functools
import inspect
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        from dsv3_megatron.metrics.hooks import around_training_log

        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return around_training_log(original, call.arguments)

    return training_log


PATCH = Patch(
    name="training_log",
    target="megatron.training.training:training_log",
    signature=(
        "(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, "
        "skipped_iter, grad_norm, params_norm, num_zeros_in_grad, max_attention_logit, pg_collection=None, "
        "is_first_iteration=False, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None)"
    ),
    why="expert load, MTP loss, dropped tokens, tokens/s and model FLOPs appear with Megatron's own log",
    install=_install,
)
