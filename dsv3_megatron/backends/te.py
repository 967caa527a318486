"""The Transformer Engine backend: fused norm and linear, fused attention, grouped GEMM, FP8.

Imported only when `--transformer-impl transformer_engine` is chosen.
"""

from functools import partial

import transformer_engine  # noqa: F401  (a missing installation must raise ModuleNotFoundError here)
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

from dsv3_megatron.backends.backend import Backend
from dsv3_megatron.backends.mla import DSV3SelfAttention

__all__ = ["BACKEND"]

BACKEND = Backend(
    norm=TENorm,
    self_attention=DSV3SelfAttention,
    core_attention=TEDotProductAttention,
    column=TEColumnParallelLinear,
    row=TERowParallelLinear,
    attention_output=TERowParallelLinear,
    down_projection=TERowParallelLinear,
    duplicated=TELinear,
    norm_column=TELayerNormColumnParallelLinear,
    routed_experts=partial(
        TEGroupedMLP,
        submodules=GroupedMLPSubmodules(
            linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
        ),
    ),
)
