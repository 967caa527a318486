"""Collects token counts from the routers and experts of this rank, and sums them over all ranks.

Every rank holds some layers (pipeline), some experts (expert parallel) and some tokens (data, context, tensor
parallel). Each contributes its counts at its layers' rows of one table; the sum over the world is the
global batch, for any layout. That is one all-reduce per logged step; other steps cost nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.metrics.experts import LayerExperts, pack, unpack

__all__ = ["Collector"]


class Collector:
    """State of one process; see `dsv3_megatron.metrics.hooks` for who calls it."""

    def __init__(self) -> None:
        self.enabled = True  # whether the running step will be logged
        self.config: Any = None
        self._layers: dict[int, Any] = {}
        self._pairs: dict[
            int, tuple[int, Tensor | int]
        ] = {}  # layer -> (token, expert) pairs routed, received
        self._rows: dict[int, Tensor] = {}

    def snapshot(self, config: Any, model: Iterable[torch.nn.Module]) -> None:
        """Take the counts of a finished global batch, right before Megatron clears them."""
        if self.config is None:
            self.config = config
            self._find_layers(model)
        if not self.enabled:
            return
        for number, layer in self._layers.items():
            router = layer.router
            routed, received = self._pairs.get(number, (0, 0))
            self._rows[number] = pack(router.local_tokens_per_expert, router.expert_bias, routed, received)
        self._pairs.clear()

    def reduce(self) -> dict[int, LayerExperts]:
        """Sum the snapshot over all ranks, each of which must call this; MoE layers by number.

        Decoder layers are numbered from 0 as in Hugging Face checkpoints; MTP depth d is number num_layers
        + d.
        """
        config = self.config
        if config is None or not config.num_moe_experts or not config.moe_router_enable_expert_bias:
            return {}
        num_rows = config.num_layers + (config.mtp_num_layers or 0)
        width = config.num_moe_experts + 5
        table = torch.zeros(num_rows, width, dtype=torch.int64, device=torch.cuda.current_device())
        for number, row in self._rows.items():
            table[number] = row
        self._rows.clear()
        dist.all_reduce(table)
        layers = {number: unpack(row) for number, row in enumerate(table.cpu())}
        return {number: layer for number, layer in layers.items() if layer is not None}

    def _find_layers(self, model: Iterable[torch.nn.Module]) -> None:
        from megatron.core.transformer.moe.moe_layer import MoELayer

        for module in (module for chunk in model for module in chunk.modules()):
            if isinstance(module, MoELayer) and module.router.expert_bias is not None:
                router = module.router
                number = router.layer_number - 1 + (self.config.num_layers if router.is_mtp_layer else 0)
                self._layers[number] = module
                self._count_pairs(number, module)

    def _count_pairs(self, number: int, layer: Any) -> None:
        """Count what the router sends and what the experts get, from the next step on."""
        from megatron.core import parallel_state

        def counts(module: torch.nn.Module) -> bool:
            # As the router's own counts: not in evaluation, and under recomputation in its second forward
            # only.
            return self.enabled and module.training and torch.is_grad_enabled()

        def sent(router: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            if counts(router):
                routed, received = self._pairs.get(number, (0, 0))
                self._pairs[number] = (routed + output[0].shape[0] * router.topk, received)

        def got(experts: Any, inputs: tuple[Tensor, Any, Any]) -> None:
            # The ranks of an expert-tensor-parallel group get the same tokens.
            if counts(experts) and parallel_state.get_expert_tensor_parallel_rank() == 0:
                routed, received = self._pairs.get(number, (0, 0))
                self._pairs[number] = (routed, received + torch.as_tensor(inputs[1]).sum())

        layer.router.register_forward_hook(sent)
        layer.experts.register_forward_pre_hook(got)
