"""The reference model: this rank's weights as they were, put in the model's place for a forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.files import whole

__all__ = ["ReferenceWeights"]


class ReferenceWeights:
    """A copy of the weights and expert biases of this rank's chunks, in the layout that they have.

    Kept in a file per rank, so that a resumed run has the reference of the run that went on.
    """

    def __init__(self, model: Sequence[Any]) -> None:
        self._live = _weights(model)
        self._values = {name: weight.detach().clone() for name, weight in self._live.items()}

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference's weights inside; afterwards it has its own, bit for bit."""
        own = {name: weight.detach().clone() for name, weight in self._live.items()}
        self._put(self._values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def renew(self) -> None:
        """The model's present weights become the reference."""
        for name, weight in self._live.items():
            self._values[name].copy_(weight)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._live.items():
            weight.copy_(values[name])

    def save(self, file: Path) -> None:
        """Write this rank's part."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as unfinished:
            torch.save(self._values, unfinished)

    def load(self, file: Path) -> None:
        """Read this rank's part.

        Raises:
            RefusedArgument: it is not there, or of another layout.
        """
        if not file.is_file():
            raise RefusedArgument(
                f"--load: the run that goes on had its reference model in {file}, which is gone. Begin anew with an "
                "empty --save, or go on in the layout that it was saved in"
            )
        found = torch.load(file, map_location="cpu", weights_only=True)
        shapes = {name: tuple(value.shape) for name, value in self._values.items()}
        if {name: tuple(value.shape) for name, value in found.items()} != shapes:
            raise RefusedArgument(
                f"--load: the reference model in {file} is of another layout. Go on in the layout that the run began in"
            )
        for name, value in found.items():
            self._values[name].copy_(value)


def _weights(model: Sequence[Any]) -> dict[str, Tensor]:
    from dsv3_megatron.specs.names import named_weights

    return {
        f"{i}.{name}": weight
        for i, chunk in enumerate(model)
        for name, weight in named_weights(chunk).items()
    }
