"""What the token counts of a layer's experts say: load, dead experts, bias range. Pure; no Megatron."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LayerExperts", "pack", "unpack"]

# Columns behind the counts in a packed row: copies, min and max of the bias as fp32 bits, routed, received.
_EXTRA = 5


@dataclass(frozen=True)
class LayerExperts:
    """One MoE layer over one global batch.

    Attributes:
        tokens_per_expert: int64 [E], padded tokens excluded.
        bias_min, bias_max: range of the selection bias after the step's update.
        routed, received: (token, expert) pairs chosen by the router, and those that reached an expert; both
            0 where they were not counted.
    """

    tokens_per_expert: Tensor
    bias_min: float
    bias_max: float
    routed: int
    received: int

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean; 1.0 is balanced. NaN when no token was routed."""
        return float(self.tokens_per_expert.max() / self.tokens_per_expert.double().mean())

    @property
    def dead(self) -> int:
        """Experts that got no token of this global batch."""
        return int((self.tokens_per_expert == 0).sum())

    @property
    def dropped(self) -> int | None:
        """Chosen (token, expert) pairs that no expert received; None where they were not counted."""
        return self.routed - self.received if self.routed else None

    def summary(self) -> dict[str, Any]:
        """The figures of this layer for a JSON record."""
        figures = {name: value for name, value in asdict(self).items() if name.startswith("bias")}
        counts = {"tokens_per_expert": self.tokens_per_expert.tolist()}
        return {
            "max_over_mean": self.max_over_mean,
            "dead": self.dead,
            **figures,
            "dropped": self.dropped,
            **counts,
        }


def pack(tokens_per_expert: Tensor, bias: Tensor, routed: int, received: Tensor | int) -> Tensor:
    """One rank's part of a layer as an int64 row [E + 5], such that the sum of all ranks' rows unpacks.

    Args:
        tokens_per_expert: [E], tokens counted by this rank.
        bias: fp32 [E], equal on all ranks that hold the layer; its range travels as bits, so that the sum
            is exact.
    """
    bits = torch.stack([bias.min(), bias.max()]).float().view(torch.int32).to(torch.int64)
    one = torch.ones(1, dtype=torch.int64, device=bias.device)
    pairs = torch.stack([one[0] * routed, one[0] * received])
    return torch.cat([tokens_per_expert.to(torch.int64), one, bits, pairs])


def unpack(row: Tensor) -> LayerExperts | None:
    """The layer from the summed row [E + 5]; None if no rank holds an MoE layer of that number.

    Raises:
        RuntimeError: the ranks that hold the layer have different biases, so copies of a router have
            drifted apart.
    """
    counts, (copies, low, high, routed, received) = row[:-_EXTRA], row[-_EXTRA:].tolist()
    if copies == 0:
        return None
    if low % copies or high % copies:
        raise RuntimeError("the expert bias of one layer differs between the ranks that hold a copy of it")
    bounds = torch.tensor([low // copies, high // copies], dtype=torch.int32).view(torch.float32)
    return LayerExperts(counts, float(bounds[0]), float(bounds[1]), int(routed), int(received))
