"""`CheckpointWithoutOutput.__init__`: recomputing norms works where Transformer Engine is not installed.

Megatron takes `fp8=False`, its own default, for "some FP8" and then reaches for names that only Transformer
Engine defines. So `--recompute-modules layernorm` fails with a NameError in the reference backend.
"""

import functools
from typing import Any

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, fp8: Any = False) -> None:
        original(self, fp8)
        self.fp8 = bool(fp8)

    return __init__


PATCH = Patch(
    name="recompute_without_te",
    target="megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",
    signature="(self, fp8=False)",
    why="recomputing norms needs Transformer Engine only with FP8",
    install=_install,
)
