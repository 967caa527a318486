"""`training.get_optimizer_param_scheduler`: `--train-tokens` has a fifth phase of the learning rate.

Megatron's WSD ends in one constant; DeepSeek-V3's schedule has a second, lower one after it (report §4.2).
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def get_optimizer_param_scheduler(optimizer: Any) -> Any:
        from megatron.training import get_args

        from dsv3_megatron.recipe.arguments import schedules_of
        from dsv3_megatron.recipe.scheduler import FivePhaseScheduler
        from dsv3_megatron.recipe.schedules import LAST_PHASE

        scheduler = original(optimizer)
        schedules = schedules_of(get_args())
        if schedules is None:
            return scheduler
        return FivePhaseScheduler.extend(scheduler, schedules.samples(LAST_PHASE), schedules.last_lr)

    return get_optimizer_param_scheduler


PATCH = Patch(
    name="get_optimizer_param_scheduler",
    target="megatron.training.training:get_optimizer_param_scheduler",
    signature="(optimizer)",
    why="--train-tokens: the learning rate has a second constant at its end, which WSD lacks",
    install=_install,
)
