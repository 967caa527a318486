"""Routed and shared experts of the reference backend, from Megatron's own classes and our linear layers."""

from functools import partial

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder

from dsv3_megatron.backends.linear import ColumnLinear, RowLinear

__all__ = ["routed_experts"]


def routed_experts() -> ExpertsBuilder:
    """The local experts one after the other (SequentialMLP), each a SwiGLU MLP with `backward_dw()`.

    An expert without tokens runs on an empty batch, so its weights get zero gradients, not None, and its
    weight gradients queue like the others'. Checkpoint keys and shards are those of Megatron's grouped
    experts, so that both backends and any expert-parallel size load each other's checkpoints.
    """
    return partial(SequentialMLP, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear))
