"""In a run: the load of each expert is counted, and every N steps experts are placed by it.

Checkpoints know nothing of it: experts go home before one is written or loaded, and back after it.
"""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.balance.placement import Machine, balanced, rank_load
from dsv3_megatron.dispatch.arguments import TWO_HOP, node_size
from dsv3_megatron.dispatch.links import node_blocks
from dsv3_megatron.expert_placement.carry import Carrier, move_layer
from dsv3_megatron.expert_placement.layers import PlacedLayer, find_layers
from dsv3_megatron.expert_placement.pieces import Move, Peer, moves_between

__all__ = ["ExpertPlacement", "current", "use"]

_current: "ExpertPlacement | None" = None


def current() -> "ExpertPlacement | None":
    """The placement of this process, None before the first step or with fixed experts."""
    return _current


def use(args: Any) -> None:
    """Hook into the run if Megatron's validated arguments ask for it."""
    if args.expert_placement != "balanced":
        return
    from dsv3_megatron.metrics import hooks as metrics
    from dsv3_megatron.training import hooks

    hooks.before_step(_begin)
    metrics.on_counts(_count)
    hooks.after_step(_after_step)
    hooks.around_checkpoint(_go_home, _go_back)
    metrics.add_figures(_figures)


def _begin(call: dict[str, Any]) -> None:
    global _current
    if _current is None:
        from megatron.training import get_args

        args = get_args()
        _current = ExpertPlacement(
            call["model"],
            call["optimizer"],
            args.expert_placement_interval,
            node_size(args),
            args.overlap_param_gather,
        )


def _count(model: Any) -> None:
    if _current is not None:
        _current.count()


def _after_step(call: dict[str, Any], result: Any) -> None:
    if _current is not None and (call["iteration"] + 1) % _current.interval == 0:
        _current.rebalance(call["iteration"] + 1)


def _go_home(call: dict[str, Any]) -> None:
    if _current is not None:
        _current.go_home()


def _go_back(call: dict[str, Any]) -> None:
    if _current is not None:
        _current.go_back()


def _figures(record: dict[str, Any]) -> dict[str, float]:
    return {} if _current is None else _current.figures(record)


class ExpertPlacement:
    """The experts of this rank's layers.

    Args:
        interval: steps between two placements.
        node_size: ranks per machine; expert groups are not torn apart between machines.
        gathers_late: weights may still be on their way from the optimizer's shards (`--overlap-param-gather`).

    Attributes:
        seconds: of each placement so far: to decide, and to move.
    """

    def __init__(
        self, model: list[Any], optimizer: Any, interval: int, node_size: int, gathers_late: bool
    ) -> None:
        from megatron.core import parallel_state

        self.model, self.optimizer, self.interval, self.gathers_late = (
            model,
            optimizer,
            interval,
            gathers_late,
        )
        self.layers = find_layers(model)
        self._counted = [layer.slots for layer in self.layers]  # in the step that was counted last
        self.seconds: list[float] = []
        # All ranks of a stage, mirrored ones too: Megatron takes these for data-parallel ranks.
        self.group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        ep_group = parallel_state.get_expert_model_parallel_group()
        peer = Peer(
            expert=parallel_state.get_expert_model_parallel_rank(),
            tensor=parallel_state.get_expert_tensor_parallel_rank(),
            copy=_copy_rank(optimizer),
        )
        self.carrier = Carrier(self.group, peer)
        config = self.layers[0].module.config if self.layers else None
        if config is not None:
            self.machine = Machine(
                num_ranks=dist.get_world_size(ep_group),
                num_nodes=len(node_blocks(dist.get_process_group_ranks(ep_group), node_size)),
                num_groups=config.moe_router_num_groups or 1,
                across_nodes=config.moe_token_dispatcher_type != TWO_HOP,
            )
            self._load = self._zeros()
        self._away: list[Tensor] | None = None

    def _zeros(self) -> Tensor:
        shape = (len(self.layers), len(self.layers[0].slots))
        return torch.zeros(shape, dtype=torch.int64, device=torch.cuda.current_device())

    def count(self) -> None:
        """Add the counts of a finished global batch, before Megatron clears them."""
        for row, layer in enumerate(self.layers):
            self._load[row] += layer.module.router.local_tokens_per_expert
        self._counted = [layer.slots for layer in self.layers]

    def rebalance(self, iteration: int) -> None:
        """Place the experts by the load since the last time."""
        if not self.layers:
            return
        begun = time.perf_counter()
        load = self._load
        dist.all_reduce(load, group=self.group)
        self._load = self._zeros()
        before = torch.stack([layer.slots for layer in self.layers])
        wanted = before.to(load.device)
        if dist.get_rank(self.group) == 0:
            wanted = balanced(load.cpu(), before, self.machine).to(load.device)
        dist.broadcast(wanted, dist.get_global_rank(self.group, 0), group=self.group)
        after = wanted.cpu()
        moved = self.move(list(after))
        self.seconds.append(time.perf_counter() - begun)
        if dist.get_rank() == 0:
            was, now = (_fullest(load.cpu(), slots, self.machine.num_ranks) for slots in (before, after))
            print(
                f"[experts] after step {iteration}: the fullest rank has {was:.3f} of the mean, {now:.3f} from now on; "
                f"{moved} of {after.numel()} experts moved; {self.seconds[-1]:.3f} s",
                flush=True,
            )

    def go_home(self) -> None:
        """Every expert to its own rank, and remember where it was."""
        assert self._away is None
        if any(not layer.at_home for layer in self.layers):
            self._away = [layer.slots for layer in self.layers]
            self.move([torch.arange(len(layer.slots)) for layer in self.layers])

    def go_back(self) -> None:
        """Undo `go_home`."""
        if self._away is not None:
            self.move(self._away)
            self._away = None

    def move(self, slots: list[Tensor]) -> int:
        """Carry the experts to these slots; returns how many left theirs."""
        from dsv3_megatron.training import hooks

        moves = {
            number: moves_between(layer.slots.tolist(), wanted.tolist(), layer.per_rank)
            for number, (layer, wanted) in enumerate(zip(self.layers, slots, strict=True))
        }
        moves = {number: found for number, found in moves.items() if found}
        if not moves:
            return 0
        if self.gathers_late:
            from megatron.training.training import force_param_sync

            force_param_sync(self.model, self.optimizer)
        hooks.experts_move(lambda tensor_of: self._carry(moves, tensor_of))
        for number, found in moves.items():
            move_layer(self.carrier, number, self.layers[number], found, self.optimizer)
            self.layers[number].place(slots[number])
        return sum(map(len, moves.values()))

    def _carry(self, moves: dict[int, list[Move]], tensor_of: Any) -> None:
        """Move a feature's own tensors of the same parameters."""
        for number, found in moves.items():
            for parameters in self.layers[number].parameters.values():
                self.carrier.whole(found, [tensor_of(parameter) for parameter in parameters])()

    def figures(self, record: dict[str, Any]) -> dict[str, float]:
        """For the log: the fullest rank over the mean in the logged step, in the layer where it is largest."""
        worst = torch.ones(1, dtype=torch.float64, device=torch.cuda.current_device())
        for layer, slots in zip(self.layers, self._counted, strict=True):
            number = _number(layer)
            counts = record.get("layers", {}).get(str(number), {}).get("tokens_per_expert")
            if counts is not None and sum(counts):
                load = torch.tensor([counts], dtype=torch.float64)
                found = _fullest(load, slots.unsqueeze(0), self.machine.num_ranks)
                worst = worst.clamp(min=found)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return {"max_over_mean_rank_load": worst.item()}


def _number(layer: PlacedLayer) -> int:
    """As the metrics number layers: the decoder's from 0, then MTP's."""
    router = layer.module.router
    return router.layer_number - 1 + (router.config.num_layers if router.is_mtp_layer else 0)


def _fullest(load: Tensor, slots: Tensor, num_ranks: int) -> float:
    """Tokens of the fullest rank over the mean, in the layer where it is largest; 1 where there are none."""
    ranks = rank_load(load.double(), slots, num_ranks)
    return float((ranks.amax(1) / ranks.mean(1).clamp(min=1e-30)).clamp(min=1).max())


def _copy_rank(optimizer: Any) -> int:
    """Which of the ranks that hold the same experts this is, as the optimizer counts that shards their state."""
    from megatron.core import parallel_state

    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for buffer in getattr(one, "buffers", []):
            if any(not getattr(p, "allreduce", True) for p in buffer.param_index_map):
                return dist.get_rank(one.data_parallel_group)
    return dist.get_rank(parallel_state.get_expert_data_parallel_group())
