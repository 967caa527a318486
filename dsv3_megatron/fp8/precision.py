"""What is quantised how: DeepSeek-V3's recipe, and the departures from it that the study tries."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dsv3_megatron.fp8.arithmetic import arithmetic_for
from dsv3_megatron.fp8.gemm import Accumulate, gemm_nt
from dsv3_megatron.fp8.products import product
from dsv3_megatron.fp8.tiles import TILE, Quantized, quantize_with_scale, tile_scale

__all__ = ["DISPATCHES", "FACTORIES", "RECIPES", "Recipe", "factory_of", "recipe_of"]

# What `--fp8-quantizer-factory` is set to, with a recipe's name behind it.
FACTORIES = "dsv3_megatron.fp8.te_recipe."
DISPATCHES = ("e4m3", "bf16")  # what may be sent to the experts, the report's first
_BF16_DISPATCH = "+bf16_dispatch"  # behind the name


@dataclass(frozen=True)
class Recipe:
    """How the three products of a Linear are computed: Fprop, Dgrad and Wgrad (report §3.3.1, §3.3.2).

    Attributes:
        name: the word after `--fp8-recipe`.
        granularity: "tile": activations and gradients by 1×128 along the inner dimension of the product, weights by
            128×128. "tensor": each matrix has one scale.
        gradients: granularity of activation gradients: "tile" as above, or "block": 128×128, which diverged in a
            longer training of DeepSeek's.
        accumulate, promote_every: see `gemm_nt`.
        dispatch: format of tokens on their way to the experts, and of their outputs' gradients.
    """

    name: str
    granularity: Literal["tile", "tensor"] = "tile"
    gradients: Literal["tile", "block"] = "tile"
    accumulate: Accumulate = "fp32"
    promote_every: int | None = TILE
    dispatch: Literal["e4m3", "bf16"] = "e4m3"

    def activation(self, x: Tensor, pow2: bool = False) -> Quantized:
        """x [M, K] as the operand of a product over K."""
        if self.granularity == "tensor":
            return _quantize_tensor(x, 1e-4)
        return arithmetic_for(x).quantize_tile(x, pow2=pow2)

    def activation_again(self, cached: Quantized) -> Quantized:
        """A cached activation [M, K], from `activation`, transposed and quantised for a product over M."""
        if self.granularity == "tensor":
            return _quantize_tensor(arithmetic_for(cached[0]).dequantize(*cached).t(), 1e-4)
        return arithmetic_for(cached[0]).requantize_transposed(*cached)

    def gradient(self, g: Tensor, pow2: bool = False) -> Quantized:
        """The same for an activation gradient: no floor, since gradients are far smaller than 1e-4."""
        if self.granularity == "tensor":
            return _quantize_tensor(g, 0.0)
        quantize = (
            arithmetic_for(g).quantize_block if self.gradients == "block" else arithmetic_for(g).quantize_tile
        )
        return quantize(g, eps=0.0, pow2=pow2)

    def weight(self, w: Tensor) -> Quantized:
        """w [N, K], as operand of products over K or (transposed) N."""
        return (
            _quantize_tensor(w, 1e-4) if self.granularity == "tensor" else arithmetic_for(w).quantize_block(w)
        )

    def product(self, a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.float32) -> Tensor:
        """a · bᵀ, computed in fp32; see `gemm_nt`."""
        if self.accumulate == "fp32":
            return product(a, b, out_dtype)
        return gemm_nt(a, b, self.accumulate, self.promote_every).to(out_dtype)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("dsv3"),
        Recipe("dsv3_per_tensor", granularity="tensor"),
        Recipe("dsv3_block_gradients", gradients="block"),
        Recipe("dsv3_no_promotion", accumulate="h800", promote_every=None),
    )
}


def recipe_of(config: Any) -> Recipe | None:
    """The recipe that a Megatron configuration or namespace names; None for Megatron's own.

    It is named by `fp8_recipe`, as the user says it, or by `fp8_quantizer_factory`, as `arguments.spell_out` says it.
    """
    factory = getattr(config, "fp8_quantizer_factory", None) or ""
    name = factory.removeprefix(FACTORIES) if factory.startswith(FACTORIES) else str(config.fp8_recipe)
    recipe = RECIPES.get(name.removesuffix(_BF16_DISPATCH))
    bf16 = name.endswith(_BF16_DISPATCH) or getattr(config, "fp8_dispatch", None) == "bf16"
    return replace(recipe, dispatch="bf16") if recipe and bf16 else recipe


def factory_of(name: str, dispatch: str | None = None) -> str:
    """What `--fp8-quantizer-factory` says for the recipe of this name and the format of its dispatch."""
    return FACTORIES + name + (_BF16_DISPATCH if dispatch == "bf16" else "")


def _quantize_tensor(x: Tensor, eps: float) -> Quantized:
    """One scale for all of x, repeated in the shape of 128×128 blocks."""
    finite = torch.where(x.isfinite(), x.abs(), 0.0).float()
    amax = finite.amax() if x.numel() else finite.new_zeros(())
    blocks = (-(-x.size(0) // TILE), -(-x.size(1) // TILE))
    scale = tile_scale(amax, eps, pow2=False).expand(blocks).contiguous()
    return quantize_with_scale(x, scale), scale
