"""Megatron's token dispatcher in two hops (report §3.2.2): over InfiniBand once per node, then over NVLink.

Megatron calls the six methods in their order; its schedule plans run `token_dispatch` and `token_combine` beside
computation, so these do nothing but the hops. What a pass needs again in its backward is in its `Route`, never here.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization, pad_routing_map
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from dsv3_megatron.dispatch.active import active
from dsv3_megatron.dispatch.hops import Combine, Dispatch, Route, SumRows, TakeRows
from dsv3_megatron.dispatch.links import links_of
from dsv3_megatron.dispatch.route import Counts, Grid, expert_order, sent
from dsv3_megatron.fp8.precision import recipe_of

__all__ = ["TwoHopTokenDispatcher"]


class TwoHopTokenDispatcher(MoETokenDispatcher):
    """See the module. Tokens never are dropped; the weights of a token's experts go with it.

    Attributes:
        expert_of_slot: [E] int64, the expert that each slot of the group holds, None where all are at home. The
            routing that comes in is by expert, what goes to whom by slot.
    """

    def __init__(
        self, num_local_experts: int, local_expert_indices: list[int], config: Any, pg_collection: Any = None
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        links = links_of(self.ep_group)
        node, index = divmod(links.rank, links.node_size)
        experts = config.num_moe_experts
        self.links = links
        self.grid = Grid(links.num_nodes, links.node_size, node, index, experts, active().num_chunks)
        recipe = recipe_of(config)
        self.fp8 = recipe is not None and getattr(recipe, "dispatch", "e4m3") == "e4m3"
        self.expert_of_slot: Tensor | None = None
        self._route: Route
        self._hidden_shape: torch.Size

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """tokens [S, B, h], routing_map [T, E] bool, probs [T, E] → this rank's rows [n, h] and weights [n, K]."""
        self._hidden_shape = tokens.shape
        tokens = tokens.view(-1, tokens.shape[-1])
        most = min(self.config.moe_router_topk, self.grid.per_node)
        if self.config.moe_router_padding_for_quantization:
            routing_map = pad_routing_map(routing_map, get_align_size_for_quantization(self.config))
            most = self.grid.per_node
        if self.expert_of_slot is not None:
            routing_map, probs = routing_map[:, self.expert_of_slot], probs[:, self.expert_of_slot]
        lines = gather_from_sequence_parallel_region(
            Counts.own(routing_map, self.grid), group=self.tp_ep_group
        )
        lines = lines.view(self.ep_size, self.tp_size, -1).cpu()  # the one time that the host waits
        self._counts = [Counts.of(lines[:, tp], self.grid) for tp in range(self.tp_size)]
        counts = self._counts[self.tp_rank]
        mine = sent(routing_map, self.grid, counts, most)
        self._route = Route(self.grid, self.links, counts, mine, most, self.fp8, self.expert_of_slot)
        weights = probs.flatten()[mine.weight] * mine.counts
        return TakeRows.apply(tokens, mine.token), weights

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """rows [n, h], weights [n, K] → pairs of a token and a local expert [p, h], weights [p], as they come."""
        return Dispatch.apply(hidden_states, probs, self._route)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs expert by expert [p, h], tokens per local expert [L] int64 on the CPU, weights [p]."""
        receipts = self._route.receipts
        expert = torch.cat([receipt.expert for receipt in receipts])
        source = torch.cat([receipt.source for receipt in receipts])
        if self.tp_size > 1:
            source = source + self.tp_rank * self.ep_size  # tensor-parallel ranks one after the other
            key = self._from_tp_ranks(torch.stack([expert, source], 1))
            expert, source = key.unbind(1)
            hidden_states, probs = self._from_tp_ranks(hidden_states), self._from_tp_ranks(probs)
        order = expert_order(expert, source, self.tp_size * self.ep_size)
        self._back = torch.empty_like(order)
        self._back[order] = torch.arange(len(order), device=order.device)
        first = self.links.rank * self.grid.per_rank
        held = slice(first, first + self.grid.per_rank)
        tokens_per_expert = torch.stack([counts.experts[:, held].sum(0) for counts in self._counts]).sum(0)
        return hidden_states.index_select(0, order), tokens_per_expert.long(), probs.index_select(0, order)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Outputs expert by expert [p, h] → pairs in the order in which they came."""
        hidden_states = hidden_states.index_select(0, self._back)
        if self.tp_size > 1:
            hidden_states = self._to_tp_ranks(hidden_states)
        return hidden_states

    def token_combine(self, hidden_states: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """Pairs [p, h] → rows [n, h] at their sources, summed over the experts of a node."""
        return Combine.apply(hidden_states, self._route)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Rows [n, h] → [S, B, h], summed over nodes."""
        num_tokens = self._hidden_shape.numel() // self._hidden_shape[-1]
        return SumRows.apply(hidden_states, self._route.sent.token, num_tokens).view(self._hidden_shape)

    def _tp_splits(self) -> list[int]:
        """Pairs of each expert-tensor-parallel rank's tokens for this rank's experts."""
        return [int(counts.pairs[:, :, self.links.rank].sum()) for counts in self._counts]

    # Gather and reduce-scatter of uneven parts by all-to-all, since gloo gathers even ones only.

    def _from_tp_ranks(self, x: Tensor) -> Tensor:
        """x [n, …] of all expert-tensor-parallel ranks, one after the other."""
        repeated = x.repeat(self.tp_size, *[1] * (x.dim() - 1))
        return all_to_all(self.tp_group, repeated, self._tp_splits(), [len(x)] * self.tp_size)

    def _to_tp_ranks(self, x: Tensor) -> Tensor:
        """The inverse: each rank gets its part [n, h] of the sum over all."""
        splits = self._tp_splits()
        own = splits[self.tp_rank]
        parts = all_to_all(self.tp_group, x, [own] * self.tp_size, splits).unflatten(0, (self.tp_size, own))
        return parts.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
