"""What the lists of both backends (`activations_te.py`, `activations_reference.py`) are made of."""

from dataclasses import dataclass
from typing import NamedTuple


class Kept(NamedTuple):
    """One kind of tensor that a block keeps of a microbatch: where it belongs, what it is, bytes."""

    part: str
    name: str
    bytes: float


@dataclass(frozen=True)
class Block:
    """One step of a stage's forward, and of its backward.

    Attributes:
        kept: from its forward to its backward.
        deferred: bytes kept from an input-only backward to the weight gradients: the inputs and output gradients
            of its linear layers.
        forward, backward: bytes needed besides while it runs.
    """

    kept: tuple[Kept, ...]
    deferred: float = 0
    forward: float = 0
    backward: float = 0

    @property
    def size(self) -> float:
        """Bytes of all that is kept."""
        return sum(tensor.bytes for tensor in self.kept)
