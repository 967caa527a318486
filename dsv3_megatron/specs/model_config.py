"""The model configuration of `--spec dsv3`, as Megatron's builder takes it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.training.models.gpt import GPTModelConfig

from dsv3_megatron.specs.block import dsv3

__all__ = ["DSV3ModelConfig"]


@dataclass(kw_only=True)
class DSV3ModelConfig(GPTModelConfig):
    """Megatron's GPT model configuration, built by `DSV3ModelBuilder`.

    Attributes:
        transformer_layer_spec: `dsv3` unless replaced.
        seed: seed of the initial weights (`--seed`).
    """

    builder: ClassVar[str] = "dsv3_megatron.specs.builder.DSV3ModelBuilder"
    initializes_by_name: ClassVar[bool] = True
    transformer_layer_spec: Any = dsv3
    seed: int = 1234
