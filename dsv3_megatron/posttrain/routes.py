"""Routing replay: the experts that the engine chose for a rollout's tokens are used again when they are trained on.

Engine and trainer may choose differently where scores nearly tie; then the trainer computes with other experts than
those that made the sample. Replayed are the experts alone: their weights are the trainer's present scores, and have
gradients. Only the decoder's routers replay. The MTP layer, which the engine's pass does not run, routes by itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.specs.names import unwrap
from dsv3_megatron.specs.router import DSV3Router

__all__ = ["RouteRecorder", "decoder_routers", "replayed", "routes_of_tokens"]


def decoder_routers(model: Any) -> dict[int, DSV3Router]:
    """Routers of a chunk's decoder by the layer's number in the whole model, from 1."""
    routers = (module for module in unwrap(model).decoder.modules() if isinstance(module, DSV3Router))
    return {int(router.layer_number): router for router in routers}


class RouteRecorder:
    """Keeps what the routers of an engine's model choose, by request.

    Args:
        engine: `inference.Engine` over a whole model on this rank (expert parallel or not, no tensor parallelism).
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._recording = False
        self._found: dict[
            int, list[tuple[int, int, Tensor]]
        ] = {}  # request → (layer, first position, [tokens, K])
        self.layers = sorted(routers := decoder_routers(engine.model))
        for column, layer in enumerate(self.layers):
            routers[layer].register_forward_hook(self._hook(column))

    def _hook(self, column: int) -> Any:
        def keep(router: DSV3Router, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            if self._recording and self._engine.engine.has_unfinished_requests():
                self._keep(column, router.topk, output[1])

        return keep

    def _keep(self, column: int, topk: int, routing_map: Tensor) -> None:
        """Rows of a step are its requests' tokens one after the other, then padding."""
        context = self._engine.context
        rows = context.active_slice
        lengths = context.request_query_lengths[rows].tolist()
        starts = context.request_kv_length_offsets[rows].tolist()
        numbers = context.request_ids[rows].tolist()
        experts = routing_map[: sum(lengths)].nonzero()[:, 1].view(-1, topk).to(torch.int16).cpu()
        for number, start, part in zip(numbers, starts, experts.split(lengths), strict=True):
            self._found.setdefault(number, []).append((column, start, part))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What is chosen inside is kept; what was kept before is forgotten."""
        self._found, self._recording = {}, True
        try:
            yield
        finally:
            self._recording = False

    def routes(self, number: int, length: int) -> Tensor:
        """Experts int16 [length, MoE layers, K] of a request's first tokens; −1 where none was recorded."""
        parts = self._found.pop(number, [])
        topk = parts[0][2].shape[1] if parts else 1
        table = torch.full((length, len(self.layers), topk), -1, dtype=torch.int16)
        for column, start, part in parts:
            kept = part[: max(0, length - start)]
            table[start : start + len(kept), column] = kept
        return table


def routes_of_tokens(sequence: Tensor, bounds: Tensor, routing: Sequence[Tensor]) -> Tensor:
    """The recorded experts of a microbatch's tokens: int64 [s, MoE layers, K], −1 for tokens of no sample.

    Args:
        sequence: int64 [s], which sample a position's label is of, −1 for none.
        bounds: cumulative lengths of the packed samples, [n + 1] with repetitions at the end.
        routing: of each sample, see `RouteRecorder.routes`; of all its tokens but the last.
    """
    _, layers, topk = routing[0].shape
    table = torch.full((len(sequence), layers, topk), -1, dtype=torch.int64)
    edges = bounds.long().unique().tolist()
    sequence = sequence.cpu()
    for start, end in pairwise(edges):
        number = int(sequence[start:end].max())
        if number >= 0:
            found = routing[number][: end - start]
            table[start : start + len(found)] = found.long()
    return table


@contextmanager
def replayed(model: Any, table: Tensor, layers: Sequence[int]) -> Iterator[None]:
    """The chunk's forward pass inside chooses the experts of `table` [s, MoE layers, K]; `layers` names its columns."""
    routers = decoder_routers(model)
    for layer, router in routers.items():
        router.given_experts = table[:, layers.index(layer)].to(router.weight.device)
    try:
        yield
    finally:
        for router in routers.values():
            router.given_experts = None
