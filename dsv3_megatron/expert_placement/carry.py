"""The tensors of experts, and their way to other ranks: weights, masters, moments, and what features keep of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.expert_placement.layers import PlacedLayer
from dsv3_megatron.expert_placement.pieces import Move, Peer, Piece, Range, pieces

__all__ = ["Carrier", "Held", "move_layer", "optimizer_tensors"]


@dataclass(frozen=True)
class Held:
    """What this rank holds of a parameter's tensor of one kind: elements [start, end), as a flat tensor."""

    tensor: Tensor
    start: int
    end: int


class Carrier:
    """Moves tensors of experts among the ranks of a stage.

    Args:
        group: all ranks that hold experts of these layers: expert-parallel ranks, their copies (mirrored ones too) and
            their expert-tensor-parallel parts.
        peer: where this rank stands.
    """

    def __init__(self, group: Any, peer: Peer) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.peers: list[Peer] = [peer] * dist.get_world_size(group)
        dist.all_gather_object(self.peers, peer, group=group)
        self._ranges: dict[Any, list[dict[int, Range]]] = {}

    def whole(self, moves: Sequence[Move], tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Tensors that every copy has whole, by slot. Sends; returns what writes the new ones into them."""
        ranges = [{slot: (0, t.numel()) for slot, t in enumerate(tensors)}] * len(self.peers)
        return self._carry(
            moves, dict(enumerate(tensors)), dict.fromkeys(range(len(tensors)), 0), ranges, False
        )

    def parts(
        self, key: Any, moves: Sequence[Move], held: dict[int, Held], dtype: torch.dtype
    ) -> Callable[[], None]:
        """Tensors whose ranges lie on the copies' ranks, by slot; `key` names them in every call alike."""
        if key not in self._ranges:  # the same in each call: the optimizer's buffers do not change
            every: list[Any] = [None] * len(self.peers)
            mine = {slot: (h.start, h.end) for slot, h in held.items()}
            dist.all_gather_object(every, mine, group=self.group)
            self._ranges[key] = every
        tensors = {slot: h.tensor for slot, h in held.items()}
        starts = {slot: h.start for slot, h in held.items()}
        return self._carry(moves, tensors, starts, self._ranges[key], True, dtype)

    def _carry(
        self,
        moves: Sequence[Move],
        tensors: dict[int, Tensor],
        starts: dict[int, int],
        ranges: Sequence[dict[int, Range]],
        between_copies: bool,
        dtype: torch.dtype | None = None,
    ) -> Callable[[], None]:
        outgoing, incoming = pieces(
            moves, self.rank, self.peers, lambda rank, slot: ranges[rank].get(slot), between_copies
        )
        kind = dtype or tensors[0].dtype
        device = torch.cuda.current_device()

        def view(piece: Piece) -> Tensor:
            start = starts[piece.slot]
            return tensors[piece.slot].detach().view(-1)[piece.start - start : piece.end - start]

        cut = [view(piece) for target in outgoing for piece in target]
        sent = torch.cat(cut).to(device) if cut else torch.empty(0, dtype=kind, device=device)
        splits_in = [sum(p.end - p.start for p in source) for source in incoming]
        splits_out = [sum(p.end - p.start for p in target) for target in outgoing]
        received = torch.empty(sum(splits_in), dtype=kind, device=device)
        dist.all_to_all_single(received, sent, splits_in, splits_out, group=self.group)

        @torch.no_grad()
        def write() -> None:
            at = 0
            for source in incoming:
                for piece in source:
                    size = piece.end - piece.start
                    view(piece).copy_(received[at : at + size])
                    at += size

        return write


def move_layer(
    carrier: Carrier, number: int, layer: PlacedLayer, moves: Sequence[Move], optimizer: Any
) -> None:
    """Weights and optimizer state of one layer; everything is sent before anything is written."""
    writes = []
    for kind, parameters in layer.parameters.items():
        writes.append(carrier.whole(moves, [parameter.data for parameter in parameters]))
        states = [optimizer_tensors(optimizer, parameter) for parameter in parameters]
        for key, dtype in _keys(carrier, (number, kind), states):
            held = {slot: state[key] for slot, state in enumerate(states) if key in state}
            if _sharded(optimizer):
                writes.append(carrier.parts((number, kind), moves, held, dtype))
            else:
                writes.append(carrier.whole(moves, [held[slot].tensor for slot in range(len(parameters))]))
    for write in writes:
        write()


def _keys(carrier: Carrier, name: Any, states: Sequence[dict[str, Held]]) -> list[tuple[str, torch.dtype]]:
    """Names and types of the state, the same on all ranks, also on those whose range is empty."""
    mine = {key: held.tensor.dtype for state in states for key, held in state.items()}
    every: list[Any] = [None] * len(carrier.peers)
    dist.all_gather_object(every, mine, group=carrier.group)
    return sorted({key: dtype for found in every for key, dtype in found.items()}.items())


def _chain(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _sharded(optimizer: Any) -> bool:
    return any(hasattr(one, "gbuf_ranges") for one in _chain(optimizer))


def optimizer_tensors(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, Held]:
    """What Megatron's optimizer keeps of a parameter on this rank, by name: master and moments.

    A master that is the parameter itself, or a view of it, is left out: it goes with the weight.
    """
    for one in _chain(optimizer):
        if getattr(one, "is_stub_optimizer", False):
            continue
        if hasattr(one, "gbuf_ranges"):  # the distributed optimizer
            if parameter not in one.model_param_group_index_map:
                continue
            group, order = one.model_param_group_index_map[parameter]
            main = one.optimizer.param_groups[group]["params"][order]
            extent = one._get_model_param_range_map(parameter)["param"]
            start, end = extent.start, extent.end
        else:
            main = getattr(parameter, "main_param", None)
            main = parameter if main is None else main
            if main not in one.optimizer.state:
                continue
            start, end = 0, parameter.numel()
        kept = {key: x for key, x in one.optimizer.state.get(main, {}).items() if torch.is_tensor(x)}
        if main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
            kept["param"] = main
        return {key: Held(x.view(-1), start, end) for key, x in kept.items() if x.numel() == end - start}
    return {}
