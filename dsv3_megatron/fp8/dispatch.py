"""All-to-all that carries E4M3 towards the experts and BF16 back (report §3.3.3, "Low-precision communication").

Forward, tokens go to their experts in E4M3 and expert outputs come back in BF16. Backward, the outputs' gradients
(those before the down projection) go to the experts in E4M3, and the inputs' gradients come back in BF16.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from dsv3_megatron.fp8 import deepep
from dsv3_megatron.fp8.arithmetic import arithmetic_for
from dsv3_megatron.fp8.message import decode_message, encode_message
from dsv3_megatron.fp8.precision import recipe_of
from dsv3_megatron.fp8.tiles import TILE

__all__ = ["FP8AlltoAllTokenDispatcher", "FP8MoELayer", "decode_message", "encode_message"]


class _AllToAll(torch.autograd.Function):
    """all_to_all whose forward, or whose backward, carries E4M3."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: dist.ProcessGroup,
        output_splits: list[int],
        input_splits: list[int],
        to_experts: bool,
    ) -> Tensor:
        ctx.group, ctx.splits, ctx.to_experts = group, (input_splits, output_splits), to_experts
        return _exchange(x, group, output_splits, input_splits, eps=1e-4 if to_experts else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output_splits, input_splits = ctx.splits
        eps = None if ctx.to_experts else 0.0
        return _exchange(grad, ctx.group, output_splits, input_splits, eps), None, None, None, None


def _exchange(x: Tensor, group: Any, output_splits: Any, input_splits: Any, eps: float | None) -> Tensor:
    """Rows to their ranks, in x's own dtype or (with eps) in E4M3."""
    if eps is None:
        return all_to_all(group, x, output_splits, input_splits)
    arithmetic = arithmetic_for(x)
    received = all_to_all(group, arithmetic.encode_message(x, eps), output_splits, input_splits)
    return arithmetic.decode_message(received, x.size(1), x.dtype)


class FP8AlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher with FP8 dispatch; combine stays as it is.

    With one expert-parallel rank nothing is sent, and the experts' own quantisation gives the same numbers.
    """

    tokens_per_expert: Any

    def token_dispatch(self, permutated_local_input_tokens: Tensor, permuted_probs: Tensor) -> Any:
        """Tokens [n, h] and probs [n] to the ranks of their experts."""
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        tokens = self._send(permutated_local_input_tokens, self.output_splits, self.input_splits, True)
        probs = all_to_all(self.ep_group, permuted_probs, self.output_splits, self.input_splits)
        return tokens, probs

    def token_combine(self, hidden_states: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """Expert outputs [n, h] back to the tokens' ranks."""
        return self._send(hidden_states, self.input_splits, self.output_splits, False)

    def _send(self, x: Tensor, output_splits: Any, input_splits: Any, to_experts: bool) -> Tensor:
        if self.ep_size == 1:
            return x
        return _AllToAll.apply(x, self.ep_group, output_splits, input_splits, to_experts)


class FP8MoELayer(MoELayer):
    """Megatron's MoE layer that dispatches what the recipe says: E4M3, or bf16 as Megatron does by itself."""

    token_dispatcher: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        recipe = recipe_of(self.config)
        assert recipe is not None, "this layer is built for a recipe of ours only"
        if recipe.dispatch == "e4m3":
            self._dispatch_in_e4m3(kwargs.get("pg_collection"))

    def _dispatch_in_e4m3(self, pg_collection: Any) -> None:
        kind, backend = self.config.moe_token_dispatcher_type, self.config.moe_flex_dispatcher_backend
        if isinstance(self.token_dispatcher, MoEAlltoAllTokenDispatcher):
            self.token_dispatcher = FP8AlltoAllTokenDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=self.config,
                pg_collection=pg_collection,
            )
        elif kind == "flex" and backend == "deepep" and self.config.hidden_size % TILE == 0:
            deepep.send_fp8_in(self.token_dispatcher.tp_ep_group)
        else:
            raise ValueError(
                f"--moe-token-dispatcher-type {kind} (--moe-flex-dispatcher-backend {backend}, --hidden-size "
                f"{self.config.hidden_size}): E4M3 is dispatched by alltoall, or by deepep in a hidden size that is a "
                f"multiple of {TILE}. Use one of these, or --fp8-dispatch bf16."
            )
