"""A temperature T of the rollouts: in a step, π is softmax(logits / T) for engine, trainer and reference alike.

Responses that were drawn at T are samples of that distribution, so its log-probabilities are those that ratio, KL and
importance weights are made of. Logits are divided where the output layer gives them; outside a step (evaluation,
checkpoints, a served model) they are as they were.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dsv3_megatron.specs.names import unwrap

__all__ = ["Temperature"]


class Temperature:
    """Divides the logits of the models that it follows, while it is on.

    Args:
        value: T, above 0. With 1 nothing is hooked.

    Attributes:
        on: whether a step of post-training is under way.
    """

    def __init__(self, value: float) -> None:
        self.value = value
        self.on = False
        self._followed: set[int] = set()

    def follow(self, models: Iterable[Any]) -> None:
        """Take hold of the output layers of these chunks, where they have one. Each is hooked once."""
        for chunk in models:
            layer = getattr(unwrap(chunk), "output_layer", None)
            if self.value == 1 or layer is None or id(layer) in self._followed:
                continue
            layer.register_forward_hook(self._divide)
            self._followed.add(id(layer))

    def _divide(self, layer: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        if not self.on:
            return None
        logits, bias = output
        return logits.float() / self.value, bias
