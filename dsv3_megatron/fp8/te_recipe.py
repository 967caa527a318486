"""DeepSeek-V3's quantisers in Transformer Engine's terms: what `--fp8-recipe dsv3` gives to its `CustomRecipe`.

As TE's `Float8BlockScaling` (E4M3 both ways, activations and gradients by 1×128, weights by 128×128, split
accumulation), with the report's floor of 1e-4 under activations and weights and none under gradients, and with its
choice of scales: powers of two where tokens are dispatched and after attention, fp32 elsewhere. That choice needs
NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1, TE's own switch; without it all scales are powers of two.

TE quantises the operands of Wgrad straight from its bf16 input, in the forward pass, and keeps one byte per number
(E4M3 by 128×1). The Linear after attention keeps its input instead: see `attention_output`.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Settings", "dsv3", "lacking", "settings_of"]

FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
ACTIVATION_FLOOR = 1e-4


class Settings(NamedTuple):
    """Arguments of TE's Float8BlockQuantizer for one operand."""

    block_scaling_dim: int  # 1: 1×128, 2: 128×128
    amax_epsilon: float
    force_pow_2_scales: bool


def settings_of(role: Any) -> Settings:
    """The settings for a role, in either of TE's forms.

    Args:
        role: `QuantizerRole` with module_type ("linear", "grouped_linear"), tensor_type ("input", "weight",
            "grad_output") and name; in older versions a string, "linear_input" and so on; None where TE asks for no
            operand of a Linear.
    """
    if isinstance(role, str):
        module, _, tensor = role.partition("_")
        name = ""
    else:
        module = getattr(role, "module_type", "")
        tensor, name = getattr(role, "tensor_type", ""), getattr(role, "name", "")
    dispatched = module == "grouped_linear" or name.endswith("linear_proj")
    pow2 = dispatched or os.environ.get(FP32_SCALES, "0") != "1"
    if tensor == "weight":
        return Settings(2, ACTIVATION_FLOOR, pow2)
    return Settings(1, 0.0 if tensor == "grad_output" else ACTIVATION_FLOOR, pow2)


def dsv3(role: Any) -> Any:
    """`qfactory` of TE's CustomRecipe: the quantizer for a role."""
    settings = settings_of(role)
    return _quantizer_class()(
        fp8_dtype=_e4m3(),
        rowwise=True,
        columnwise=True,
        amax_epsilon=settings.amax_epsilon,
        force_pow_2_scales=settings.force_pow_2_scales,
        block_scaling_dim=settings.block_scaling_dim,
    )


def lacking() -> str:
    """What the installed Transformer Engine lacks for this recipe, "" for nothing."""
    for what, find in (("CustomRecipe", _recipe_class), ("Float8BlockQuantizer", _quantizer_class)):
        try:
            find()
        except (ImportError, AttributeError, OSError):
            return what
    return ""


def _recipe_class() -> Any:
    return importlib.import_module("transformer_engine.common.recipe").CustomRecipe


def _quantizer_class() -> Callable[..., Any]:
    module = importlib.import_module("transformer_engine.pytorch.tensor.float8_blockwise_tensor")
    return module.Float8BlockQuantizer


def _e4m3() -> Any:
    """TE's name of E4M3, which moved from its extension to its constants."""
    constants = importlib.import_module("transformer_engine.pytorch.constants")
    dtypes = getattr(constants, "DType", None) or importlib.import_module("transformer_engine_torch").DType
    return dtypes.kFloat8E4M3
