"""`arguments.validate_args`: features take hold of validated arguments (`training.hooks`), in every way into the trainer.

Megatron validates a layout as it knows it; only then can it be folded into a V, and it must be before the model's
configuration is made from the arguments. Likewise it takes a final batch size or a ramp; ours has both.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def validate_args(args: Any, defaults: Any = {}) -> Any:  # noqa: B006 - the original's signature
        from dsv3_megatron.training import hooks

        result = original(args, defaults)
        hooks.validated(args)
        return result

    return validate_args


PATCH = Patch(
    name="validate_args",
    target="megatron.training.arguments:validate_args",
    signature="(args, defaults={})",
    why="--pipeline-schedule: the validated layout is folded into a V before the model is configured from it; "
    "--batch-ramp: validated with its final batch size",
    install=_install,
)
