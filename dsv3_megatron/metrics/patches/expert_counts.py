"""`reset_model_temporary_tensors`: the metrics see the routers' token counts before Megatron clears them."""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def reset_model_temporary_tensors(config: Any, model: Any) -> None:
        from dsv3_megatron.metrics.hooks import before_counts_are_cleared

        before_counts_are_cleared(config, model)
        original(config, model)

    return reset_model_temporary_tensors


PATCH = Patch(
    name="expert_counts",
    target="megatron.core.distributed.finalize_model_grads:reset_model_temporary_tensors",
    signature="(config, model)",
    why="expert load is read from the routers' counts, which Megatron clears after each global batch",
    install=_install,
)
