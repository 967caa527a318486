"""Transformer Engine's backend with what TE lacks for `--fp8-recipe dsv3`: FP8 dispatch, attention's output in E5M6.

Imported only when `--transformer-impl transformer_engine` is chosen.
"""

from dataclasses import replace

from megatron.core.extensions.transformer_engine import TERowParallelLinear

from dsv3_megatron.backends import te
from dsv3_megatron.fp8.attention_output import KeepsInputInE5M6
from dsv3_megatron.fp8.dispatch import FP8MoELayer

__all__ = ["BACKEND", "TEAttentionOutput"]


class TEAttentionOutput(KeepsInputInE5M6, TERowParallelLinear):
    """TE's row-parallel Linear after attention."""


BACKEND = replace(
    te.BACKEND,
    attention_output=TEAttentionOutput,
    moe_layer=FP8MoELayer,
)
