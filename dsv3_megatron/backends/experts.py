"""Routed and shared experts of the reference backend, from Megatron's own classes and our linear layers."""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from torch import Tensor

from dsv3_megatron.backends.linear import ColumnLinear, RowLinear, has_own_storage

__all__ = ["LocalExperts", "plain_swiglu", "routed_experts"]


class LocalExperts(SequentialMLP):
    """Megatron's experts, one after the other; in inference only those that have tokens, and nothing around them."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Hidden states [t, h] sorted by expert, tokens of each expert, probabilities [t] → [t, h], no bias."""
        if not (torch.is_inference_mode_enabled() and self._is_plain()):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        if not len(permuted_local_hidden_states):
            return permuted_local_hidden_states, None
        up, down = self._products(tokens_per_expert)
        return down(_swiglu(up(permuted_local_hidden_states), permuted_probs)), None

    def _products(self, tokens_per_expert: Tensor) -> tuple[Callable[[Tensor], Tensor], ...]:
        """x [t, in] sorted by expert → [t, out], for the first and the second layer."""
        if stacks := self._stacked():
            offsets = tokens_per_expert.cumsum(0).to(torch.int32)
            return tuple(
                partial(_grouped_mm, weight_EKN=weight.transpose(1, 2), offsets=offsets) for weight in stacks
            )
        counts = tokens_per_expert.tolist()
        used = [expert for expert, count in zip(self.local_experts, counts, strict=True) if count]
        sizes = [count for count in counts if count]
        return tuple(
            partial(_one_by_one, weights=[getattr(e, name).weight for e in used], sizes=sizes)
            for name in ("linear_fc1", "linear_fc2")
        )

    def _stacked(self) -> tuple[Tensor, Tensor] | None:
        """[experts, out, in] of both layers, in which each expert's weight is a view; None where that cannot be.

        Weights that have storage of their own are moved into one together, once: parameters and state stay what they
        are, and a trainer's changes are seen. Those that lie in a buffer of DDP's stay there.
        """
        weights = self._weights()
        every = (*weights[0], *weights[1])
        found, places = self.__dict__.get("_stacks", (None, None))
        if places != [weight.data_ptr() for weight in every]:
            found = None
            if all(map(_grouped_mm_serves, every)) and all(map(has_own_storage, every)):
                found = _stack(weights[0]), _stack(weights[1])
            self.__dict__["_stacks"] = found, [weight.data_ptr() for weight in every]
        return found

    def _weights(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        """Of both layers of each expert; looking up a module's attributes takes long, so once."""
        if "_of_experts" not in self.__dict__:
            self.__dict__["_of_experts"] = (
                [expert.linear_fc1 for expert in self.local_experts],
                [expert.linear_fc2 for expert in self.local_experts],
            )
        first, second = self.__dict__["_of_experts"]
        return [x._parameters["weight"] for x in first], [x._parameters["weight"] for x in second]

    def _is_plain(self) -> bool:
        """Whether each expert is SwiGLU between our own layers, whole on this rank."""
        expert, config = self.local_experts[0], self.config
        return (
            type(expert.linear_fc1) is ColumnLinear
            and type(expert.linear_fc2) is RowLinear
            and self.tp_group.size() == 1
            and config.activation_func is F.silu
            and config.gated_linear_unit
            and not config.glu_linear_offset
            and config.activation_func_clamp_value is None
            and not config.moe_apply_probs_on_input
        )


def _one_by_one(x: Tensor, weights: list[Tensor], sizes: list[int]) -> Tensor:
    return torch.cat([F.linear(part, weight) for part, weight in zip(x.split(sizes), weights, strict=True)])


def _grouped_mm(x: Tensor, weight_EKN: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, weight_EKN, offs=offsets)


@cache
def _grouped_mm_works(dtype: torch.dtype) -> bool:
    """Whether this torch has it on the CPU for the dtype."""
    try:
        x, weight = torch.ones(2, 16, dtype=dtype), torch.ones(2, 16, 16, dtype=dtype)
        product = F.grouped_mm(x, weight.transpose(1, 2), offs=torch.tensor([1, 2], dtype=torch.int32))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool((product == 16).all())


def _grouped_mm_serves(weight: Tensor) -> bool:
    """On a GPU it wants shapes and dtypes of its own, and Transformer Engine has the grouped layers."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape)
    return weight.device.type == "cpu" and aligned and _grouped_mm_works(weight.dtype)


def _stack(weights: list[torch.nn.Parameter]) -> Tensor:
    """[experts, out, in], in memory as the weights are: see `lay_out_for_inference`."""
    with torch.inference_mode(False), torch.no_grad():
        if all(weight.is_contiguous() for weight in weights):
            stack = torch.stack([weight.data for weight in weights])
        else:
            stack = torch.stack([weight.data.t() for weight in weights]).transpose(1, 2)
        for weight, view in zip(weights, stack, strict=True):
            weight.data = view
    return stack


def _swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up * probs.unsqueeze(-1)).to(gate_up.dtype)


def plain_swiglu(mlp: torch.nn.Module, x: Tensor) -> Tensor | None:
    """A SwiGLU MLP of our own layers, whole on this rank, without what its class does around it; None for others."""
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    config = mlp.config
    if not (
        type(fc1) is ColumnLinear
        and type(fc2) is RowLinear
        and fc1.tp_group.size() == 1
        and config.activation_func is F.silu
        and config.gated_linear_unit
        and not config.glu_linear_offset
        and config.activation_func_clamp_value is None
        and not getattr(mlp, "use_shared_expert_gate", False)
    ):
        return None
    gate, up = F.linear(x, fc1.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, fc2.weight)


def routed_experts() -> ExpertsBuilder:
    """The local experts one after the other (SequentialMLP), each a SwiGLU MLP with `backward_dw()`.

    An expert without tokens runs on an empty batch in training, so its weights get zero gradients, not None, and its
    weight gradients queue like the others'. Checkpoint keys and shards are those of Megatron's grouped
    experts, so that both backends and any expert-parallel size load each other's checkpoints.
    """
    return partial(LocalExperts, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear))
