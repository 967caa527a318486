"""`training.get_forward_backward_func`: Megatron chooses its schedule by if and else, without a registry."""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        from dsv3_megatron import dualpipe

        return dualpipe.forward_backward_func() or original(*args, **kwargs)

    return get_forward_backward_func


PATCH = Patch(
    name="get_forward_backward_func",
    target="megatron.training.training:get_forward_backward_func",
    signature="(pp_size=None, vp_size=None, schedule_pg_collection=None)",
    why="--pipeline-schedule: the trainer and its evaluation run our tables",
    install=_install,
)
