"""DeepSeek-V3's recipe in Transformer Engine's terms: what `--fp8-recipe dsv3` is there.

It is TE's `Float8BlockScaling` (E4M3 both ways, activations and gradients by 1×128, weights by 128×128, split
accumulation) with the report's floor of 1e-4 under activations and weights and none under gradients. Scales are powers
of two, TE's default; NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1, TE's own switch, makes all of them fp32.

It is a subclass and not a `CustomRecipe`, because TE asks `recipe.float8_block_scaling()` before it gathers parameters
or sequence-parallel inputs in FP8, and before it multiplies all experts in one call.

TE quantises the operands of Wgrad straight from its bf16 input, in the forward pass, and keeps one byte per number
(E4M3 by 128×1), but where a Linear is told to keep its input: see `attention_output` and `te_mlp`.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["FP32_SCALES", "has_fp32_scales", "lacking", "recipe_named"]

FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
_NEEDED = (
    ("transformer_engine.common.recipe", "Float8BlockScaling"),
    ("transformer_engine.common.recipe", "QParams"),
    ("transformer_engine.pytorch.tensor.float8_blockwise_tensor", "Float8BlockQuantizer"),
)
_LINEARS = ("Linear", "GroupedLinear")  # of which some keep their input: `save_original_input`


def recipe_named(name: str) -> Any:
    """The recipe, in TE's form.

    Raises:
        ValueError: for any but `dsv3`: a departure from the report, which TE's kernels do not compute.
    """
    if name != "dsv3":
        raise ValueError(
            f"--fp8-recipe {name}: only the reference backend computes it. Use --transformer-impl local, or "
            "--fp8-recipe dsv3"
        )
    return importlib.import_module("dsv3_megatron.fp8.te_block_scaling").DSV3BlockScaling()


def has_fp32_scales(env: Mapping[str, str]) -> bool:
    """Whether a job with these variables tells TE to use fp32 scales."""
    return env.get(FP32_SCALES, "0") == "1"


def lacking() -> str:
    """What the installed Transformer Engine lacks for this recipe, "" for nothing; found by looking for it."""
    try:
        for module, name in _NEEDED:
            if not hasattr(importlib.import_module(module), name):
                return name
        pytorch = importlib.import_module("transformer_engine.pytorch")
        for name in _LINEARS:
            if "save_original_input" not in inspect.signature(getattr(pytorch, name).__init__).parameters:
                return f"{name}(save_original_input)"
    except (ImportError, AttributeError, OSError) as error:
        return f"usable {_NEEDED[0][1]} ({type(error).__name__}: {error})"
    return ""
