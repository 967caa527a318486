"""The class behind `te_recipe.dsv3`, in a module of its own because its base needs Transformer Engine."""

from dataclasses import replace
from typing import Any

from transformer_engine.common.recipe import Float8BlockScaling

__all__ = ["DSV3BlockScaling"]

ACTIVATION_FLOOR = 1e-4


class DSV3BlockScaling(Float8BlockScaling):
    """TE's block scaling with the report's floors under a tile's largest absolute value (§3.3.2)."""

    fp8_quant_fwd_inp = replace(Float8BlockScaling.fp8_quant_fwd_inp, amax_epsilon=ACTIVATION_FLOOR)
    fp8_quant_fwd_weight = replace(Float8BlockScaling.fp8_quant_fwd_weight, amax_epsilon=ACTIVATION_FLOOR)
    fp8_quant_bwd_grad = replace(Float8BlockScaling.fp8_quant_bwd_grad, amax_epsilon=0.0)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a checkpoint it is TE's own class, with the floors as attributes of the object.

        TE saves the recipe with each module. Newer versions refuse to load any but their own, as a pickle that may run
        code; older ones quantise with the recipe that was loaded, which therefore needs the floors.
        """
        settings = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")
        state = {**self.__dict__, **{name: getattr(self, name) for name in settings}}
        return Float8BlockScaling, (), state
