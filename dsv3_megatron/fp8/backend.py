"""The reference backend with FP8 products and FP8 dispatch: what `--fp8-recipe dsv3` puts into the specs."""

from dataclasses import replace

from dsv3_megatron.backends import reference
from dsv3_megatron.fp8.dispatch import FP8MoELayer
from dsv3_megatron.fp8.linear import (
    FP8AttentionOutput,
    FP8ColumnLinear,
    FP8DownProjection,
    FP8DuplicatedLinear,
    FP8RowLinear,
)
from dsv3_megatron.fp8.mlp import FP8MLP, FP8SharedExpertMLP, routed_experts

__all__ = ["BACKEND"]

BACKEND = replace(
    reference.BACKEND,
    column=FP8ColumnLinear,
    row=FP8RowLinear,
    duplicated=FP8DuplicatedLinear,
    attention_output=FP8AttentionOutput,
    down_projection=FP8DownProjection,
    mlp=FP8MLP,
    shared_expert=FP8SharedExpertMLP,
    moe_layer=FP8MoELayer,
    routed_experts=routed_experts(),
)
