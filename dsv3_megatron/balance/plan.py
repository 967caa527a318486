"""The load of each GPU with redundant experts, beside the load without."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.balance.eplb import rebalance_experts

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What `rebalance_experts` says of a load.

    Attributes:
        layers: number of each MoE layer, as in the checkpoints; MTP layers follow the decoder's.
        gpus, nodes, groups: as given.
        phy2log [L, R], log2phy [L, E, copies], logcnt [L, E]: see `rebalance_experts`.
        before, after: [L, gpus], tokens of each GPU; before: experts in their order.
    """

    layers: list[int]
    gpus: int
    nodes: int
    groups: int
    phy2log: Tensor
    log2phy: Tensor
    logcnt: Tensor
    before: Tensor
    after: Tensor

    @property
    def hierarchical(self) -> bool:
        """Whether expert groups stay on one node."""
        return self.groups % self.nodes == 0

    def as_dict(self) -> dict[str, Any]:
        """For output=json: everything, layers by number; `log2phy` without padding."""
        before, after = max_over_mean(self.before), max_over_mean(self.after)
        layers = {
            str(number): {
                "phy2log": self.phy2log[i].tolist(),
                "log2phy": [[slot for slot in slots if slot >= 0] for slots in self.log2phy[i].tolist()],
                "logcnt": self.logcnt[i].tolist(),
                "gpu_load_before": self.before[i].tolist(),
                "gpu_load_after": self.after[i].tolist(),
                "max_over_mean_before": before[i],
                "max_over_mean_after": after[i],
            }
            for i, number in enumerate(self.layers)
        }
        return {
            "gpus": self.gpus,
            "nodes": self.nodes,
            "groups": self.groups,
            "replicas": self.phy2log.shape[1],
            "policy": "hierarchical" if self.hierarchical else "global",
            "max_over_mean_before": max(before),
            "max_over_mean_after": max(after),
            "layers": layers,
        }


def make_plan(load: dict[int, list[float]], replicas: int, groups: int, nodes: int, gpus: int) -> Plan:
    """Plan for the tokens of each expert, layers by number.

    Raises:
        ValueError: the numbers do not divide (see `rebalance_experts`).
    """
    weight_LE = torch.tensor(list(load.values()), dtype=torch.float64)
    phy2log_LR, log2phy, logcnt_LE = rebalance_experts(weight_LE, replicas, groups, nodes, gpus)
    return Plan(
        layers=list(load),
        gpus=gpus,
        nodes=nodes,
        groups=groups,
        phy2log=phy2log_LR,
        log2phy=log2phy,
        logcnt=logcnt_LE,
        before=_gpu_load(weight_LE, _in_their_order(weight_LE.shape[1], replicas, gpus), gpus),
        after=_gpu_load(weight_LE, phy2log_LR, gpus),
    )


def max_over_mean(gpu_load_LG: Tensor) -> list[float]:
    """Of each layer; 1.0 is balanced (and what a layer without tokens gets)."""
    mean = gpu_load_LG.mean(1)
    return torch.where(mean > 0, gpu_load_LG.amax(1) / mean.clamp(min=1e-30), 1.0).tolist()


def _in_their_order(experts: int, replicas: int, gpus: int) -> Tensor:
    """[R'] Without copies where the GPUs divide the experts, else over and over until every slot has one."""
    return torch.arange(experts if experts % gpus == 0 else replicas) % experts


def _gpu_load(weight_LE: Tensor, slots: Tensor, gpus: int) -> Tensor:
    """[L, gpus] for the expert of each slot, [R] or [L, R]; copies of an expert share its tokens."""
    slots_LR = slots.expand(len(weight_LE), -1)
    count = torch.zeros_like(weight_LE).scatter_add_(
        1, slots_LR, torch.ones(slots_LR.shape, dtype=weight_LE.dtype)
    )
    return (weight_LE / count.clamp(min=1)).gather(1, slots_LR).unflatten(1, (gpus, -1)).sum(2)
