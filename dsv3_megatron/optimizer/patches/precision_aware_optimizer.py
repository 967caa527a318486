"""`OptimizerConfig.__post_init__`: precision-aware optimizer with our AdamW, and whole fp32 master weights.

Megatron accepts the option only when it can import Transformer Engine's `FusedAdam`; where ours takes its
place (`dsv3_megatron.optimizer.install`), Megatron's check is shown ours. Megatron also has no argument for
`store_param_remainders`, which is on with Transformer Engine: such checkpoints hold 16 bits of each master
weight and load neither in the fully reshardable format nor with another optimizer, so it is turned off.
"""

import functools
import sys
import types
from typing import Any
from unittest import mock

from dsv3_megatron.patching import Patch


def _modules_with_fused_adam() -> dict[str, types.ModuleType]:
    """What `from transformer_engine.pytorch.optimizers import FusedAdam` needs to find, with our class."""
    from dsv3_megatron.optimizer.adamw import AdamW

    optimizers = types.ModuleType("transformer_engine.pytorch.optimizers")
    optimizers.FusedAdam = AdamW  # type: ignore[attr-defined]
    names = ("transformer_engine", "transformer_engine.pytorch")
    return {name: types.ModuleType(name) for name in names} | {optimizers.__name__: optimizers}


def _install(original: Any) -> Any:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        from megatron.core.utils import get_te_version

        from dsv3_megatron.optimizer import implementation

        if not self.use_precision_aware_optimizer or implementation() != "dsv3_megatron":
            original(self)
        else:
            get_te_version()  # Megatron caches it: the stand-in modules below have no version.
            with mock.patch.dict(sys.modules, _modules_with_fused_adam()):
                original(self)
        self.store_param_remainders = False

    return __post_init__


PATCH = Patch(
    name="precision_aware_optimizer",
    target="megatron.core.optimizer.optimizer_config:OptimizerConfig.__post_init__",
    signature="(self)",
    why="bf16 moments without Transformer Engine, and checkpoints with whole fp32 master weights",
    install=_install,
)
