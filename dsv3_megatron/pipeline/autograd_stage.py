"""A stage made of an ordinary torch module, whose layers may put their weight gradients off."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .stage import Pass


class WeightGradients:
    """Weight-gradient computations that wait for their W.

    A layer hands its computation to `put` during backward. During `collect` it waits under a key; without,
    it runs at once, as in a full backward.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[Callable[[], None]]] = {}
        self._open: list[Callable[[], None]] | None = None

    def put(self, compute: Callable[[], None]) -> None:
        """Run `compute` now, or keep it for `run` when they are being collected."""
        if self._open is None:
            compute()
        else:
            self._open.append(compute)

    def collect(self, key: int, backward: Callable[[], None]) -> None:
        """Run `backward` and keep what its layers put, under `key`."""
        self._open = self._waiting.setdefault(key, [])
        try:
            backward()
        finally:
            self._open = None

    def run(self, key: int) -> None:
        """Run what was kept under `key`."""
        for compute in self._waiting.pop(key):
            compute()


class AutogradStage:
    """Implements `Stage` for a module `Tensor -> Tensor`.

    Args:
        module: the layers. Layers that put off their weight gradients use `weight_gradients.put`; those of
            all other layers are computed in B-input already, which is correct but fills no bubble.
        weight_gradients: shared with those layers.
        first_input: of a first stage, microbatch to input.
        loss: of a last stage, (output, microbatch) to a scalar that is already divided by the number of
            microbatches.
    """

    def __init__(
        self,
        module: nn.Module,
        weight_gradients: WeightGradients,
        first_input: Callable[[int], Tensor] | None = None,
        loss: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        self.module = module
        self.losses: dict[int, Tensor] = {}
        self._weight_gradients = weight_gradients
        self._first_input = first_input
        self._loss = loss
        self._kept: dict[int, tuple[Tensor | None, Tensor]] = {}  # microbatch to activation and output

    def forward(self, which: Pass, activation: Tensor | None) -> Tensor | None:
        """See `Stage.forward`; a last stage keeps the loss in `losses[microbatch]`."""
        if activation is None:
            assert self._first_input is not None, "a stage without activation needs first_input"
            output = self.module(self._first_input(which.microbatch))
        else:
            output = self.module(activation.requires_grad_())
        if self._loss is not None:
            output = self._loss(output, which.microbatch)
            self.losses[which.microbatch] = output.detach()
        self._kept[which.microbatch] = (activation, output)
        return output if self._loss is None else None

    def backward(self, which: Pass, gradient: Tensor | None) -> Tensor | None:
        """See `Stage.backward`."""
        activation, output = self._kept.pop(which.microbatch)
        torch.autograd.backward(output, gradient)
        return None if activation is None else activation.grad

    def backward_input(self, which: Pass, gradient: Tensor | None) -> Tensor | None:
        """See `Stage.backward_input`."""
        activation, output = self._kept.pop(which.microbatch)
        self._weight_gradients.collect(which.microbatch, lambda: torch.autograd.backward(output, gradient))
        return None if activation is None else activation.grad

    def backward_weight(self, which: Pass) -> None:
        """See `Stage.backward_weight`."""
        self._weight_gradients.run(which.microbatch)
