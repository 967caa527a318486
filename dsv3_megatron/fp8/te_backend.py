"""Transformer Engine's backend with what TE lacks for `--fp8-recipe dsv3`.

That is the recipe itself, FP8 dispatch, attention's output in E5M6, and SwiGLU's input in E4M3. Imported only when
`--transformer-impl transformer_engine` is chosen.
"""

from dataclasses import replace

from megatron.core.extensions.transformer_engine import TERowParallelLinear

from dsv3_megatron.backends import te
from dsv3_megatron.fp8.attention_output import KeepsInputInE5M6
from dsv3_megatron.fp8.dispatch import FP8MoELayer
from dsv3_megatron.fp8.mlp import FP8MLP, FP8SharedExpertMLP
from dsv3_megatron.fp8.te_mlp import TEDownProjection, routed_experts
from dsv3_megatron.patching import install

__all__ = ["BACKEND", "TEAttentionOutput"]

install(["get_fp8_recipe"])


class TEAttentionOutput(KeepsInputInE5M6, TERowParallelLinear):
    """TE's row-parallel Linear after attention."""


BACKEND = replace(
    te.BACKEND,
    attention_output=TEAttentionOutput,
    down_projection=TEDownProjection,
    mlp=FP8MLP,
    shared_expert=FP8SharedExpertMLP,
    moe_layer=FP8MoELayer,
    routed_experts=routed_experts(),
)
