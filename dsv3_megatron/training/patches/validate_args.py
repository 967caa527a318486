"""`arguments.validate_args`: features take hold of validated arguments (`training.hooks`), in every way into the trainer.

Megatron validates a layout as it knows it; only then can it be folded into a V, and it must be before the model's
configuration is made from the arguments. Likewise it takes a final batch size or a ramp; ours has both.

Before Blackwell it also asserts CUDA_DEVICE_MAX_CONNECTIONS=1 for tensor and context parallelism, unless
`--overlap-moe-expert-parallel-comm` is given. A schedule of ours overlaps too, and needs more (refusals.machine): the
assertion is shown what it asks for.
"""

import functools
import os
from typing import Any
from unittest import mock

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def validate_args(args: Any, defaults: Any = {}) -> Any:  # noqa: B006 - the original's signature
        from dsv3_megatron.training import hooks

        own_schedule = getattr(args, "pipeline_schedule", "1f1b") != "1f1b"
        shown = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if own_schedule else {}
        with mock.patch.dict(os.environ, shown):
            result = original(args, defaults)
        hooks.validated(args)
        return result

    return validate_args


PATCH = Patch(
    name="validate_args",
    target="megatron.training.arguments:validate_args",
    signature="(args, defaults={})",
    why="--pipeline-schedule: the validated layout is folded into a V before the model is configured from it; "
    "--batch-ramp: validated with its final batch size; TP or CP with a schedule of ours: more than one hardware queue",
    install=_install,
)
