"""The recipe in Transformer Engine's terms: its settings, what TE makes of it, what the installed TE lacks."""

import copy
import importlib
import importlib.util
import os
import pickle
import pickletools
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dsv3_megatron.fp8 import te_recipe
from dsv3_megatron.fp8.precision import RECIPES, factory_of


@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


class Float8BlockScaling:
    """As TE 2.8 … 2.20 have it: the parameters of the quantisers are attributes of the class, not fields."""

    fp8_quant_fwd_inp = fp8_quant_fwd_weight = fp8_quant_bwd_grad = QParams(power_2_scale=True)

    def __init__(self, fp8_format: str = "e4m3"):
        self.fp8_format = fp8_format


class Linear:
    def __init__(self, in_features: int, save_original_input: bool = False):
        pass


class OldLinear:
    def __init__(self, in_features: int):
        pass


RECIPE, QUANTIZER = (
    "transformer_engine.common.recipe",
    "transformer_engine.pytorch.tensor.float8_blockwise_tensor",
)


@pytest.fixture
def fake_te(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Transformer Engine's modules as far as they are looked into."""
    contents: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.common": {},
        RECIPE: {"Float8BlockScaling": Float8BlockScaling, "QParams": QParams},
        "transformer_engine.pytorch": {"Linear": Linear, "GroupedLinear": Linear},
        "transformer_engine.pytorch.tensor": {},
        QUANTIZER: {"Float8BlockQuantizer": object},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        vars(module).update(contents[name])
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dsv3_megatron.fp8.te_block_scaling", raising=False)
    return modules


def test_settings(fake_te: Any) -> None:
    """TE's block scaling, its power-of-two rule, the report's floors under activations and weights."""
    recipe = te_recipe.recipe_named("dsv3")
    assert isinstance(recipe, Float8BlockScaling) and type(recipe) is not Float8BlockScaling
    assert recipe.fp8_quant_fwd_inp == recipe.fp8_quant_fwd_weight == QParams(True, 1e-4)
    assert recipe.fp8_quant_bwd_grad == QParams(True, 0.0)
    assert Float8BlockScaling.fp8_quant_fwd_inp == QParams(True)  # TE's own is left alone


def test_fp32_scales_are_tes_switch(fake_te: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        monkeypatch.setattr(Float8BlockScaling, name, QParams(power_2_scale=False))
    recipe = te_recipe.recipe_named("dsv3")
    assert recipe.fp8_quant_fwd_inp == QParams(False, 1e-4) and recipe.fp8_quant_bwd_grad == QParams(False)
    for value, expected in (("1", True), ("0", False), ("", False)):
        assert te_recipe.has_fp32_scales({te_recipe.FP32_SCALES: value}) is expected


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "dsv3"])
def test_departures_are_refused_by_name(name: str) -> None:
    """No silent replacement by plain block scaling, whoever asks Megatron for its recipe."""
    with pytest.raises(ValueError, match=f"--fp8-recipe {name}: only the reference backend computes it"):
        te_recipe.recipe_named(name)


def test_a_checkpoint_holds_tes_own_class(fake_te: Any) -> None:
    """TE 2.18 and later load no class but their own; earlier ones quantise with what they loaded."""
    saved = pickle.dumps({"recipe": te_recipe.recipe_named("dsv3")})
    assert b"DSV3BlockScaling" not in saved and b"te_block_scaling" not in saved
    loaded = pickle.loads(saved)["recipe"]
    assert type(loaded) is Float8BlockScaling
    assert loaded.fp8_quant_fwd_inp == loaded.fp8_quant_fwd_weight == QParams(True, 1e-4)
    assert copy.deepcopy(te_recipe.recipe_named("dsv3")).fp8_quant_fwd_inp == QParams(True, 1e-4)


@pytest.mark.parametrize(
    "module, name, replacement, expected",
    [
        (RECIPE, "Float8BlockScaling", None, "Float8BlockScaling"),
        (RECIPE, "QParams", None, "QParams"),
        (QUANTIZER, "Float8BlockQuantizer", None, "Float8BlockQuantizer"),
        ("transformer_engine.pytorch", "Linear", OldLinear, "Linear(save_original_input)"),
        ("transformer_engine.pytorch", "GroupedLinear", OldLinear, "GroupedLinear(save_original_input)"),
    ],
)
def test_features_are_detected(
    fake_te: dict[str, ModuleType], module: str, name: str, replacement: Any, expected: str
) -> None:
    assert te_recipe.lacking() == ""
    if replacement is None:
        delattr(fake_te[module], name)
    else:
        setattr(fake_te[module], name, replacement)
    assert te_recipe.lacking() == expected


def test_a_broken_installation_is_named(fake_te: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, RECIPE, None)
    assert te_recipe.lacking().startswith("usable Float8BlockScaling (ModuleNotFoundError")


def config(name: str = "dsv3", **fields: Any) -> SimpleNamespace:
    factory = factory_of(name)
    return SimpleNamespace(
        fp8="e4m3", fp8_recipe="blockwise", fp8_quantizer_factory=factory, fp4=None, **fields
    )


def test_the_patch_takes_ours_and_leaves_the_others(fake_te: Any) -> None:
    patch = importlib.import_module("dsv3_megatron.fp8.patches.get_fp8_recipe").PATCH
    replaced = patch.install(lambda config: "Megatron's")
    assert isinstance(replaced(config()), Float8BlockScaling)
    assert replaced(SimpleNamespace(fp8_recipe="blockwise", fp8_quantizer_factory=None)) == "Megatron's"
    with pytest.raises(ValueError, match="--fp8-recipe dsv3_per_tensor: only the reference"):
        replaced(config("dsv3_per_tensor"))


@pytest.mark.te
@pytest.mark.usefixtures("single_rank")
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None or os.environ.get("DSV3_TEST_TE") != "1",
    reason="needs Transformer Engine and DSV3_TEST_TE=1: `make test-te`",
)
class TestTransformerEngine:
    """Real TE on CPU: no kernel runs."""

    def recipe(self) -> Any:
        from megatron.core import fp8_utils

        from dsv3_megatron.fp8 import te_backend  # noqa: F401  (installs the patch, as every model does)

        return fp8_utils.get_fp8_recipe(config())

    def test_megatron_finds_the_recipe(self) -> None:
        from transformer_engine.common.recipe import Float8BlockScaling, Format

        assert te_recipe.lacking() == ""
        recipe = self.recipe()
        assert isinstance(recipe, Float8BlockScaling) and recipe.fp8_format is Format.E4M3
        # The branches of TE that a CustomRecipe is left out of.
        assert recipe.float8_block_scaling() and not recipe.custom()

    def test_quantizers(self) -> None:
        """What TE makes of the recipe, per operand: its own state, the report's floors."""
        import torch
        from transformer_engine.pytorch.quantization import Float8BlockScalingRecipeState, RecipeState

        cpu = torch.device("cpu")
        made = {}
        for mode, count in (("forward", 3), ("backward", 2)):
            state = RecipeState.create(self.recipe(), mode=mode, num_quantizers=count, device=cpu)
            assert isinstance(state, Float8BlockScalingRecipeState)
            made[mode] = state.make_quantizers()
        activation, weight = made["forward"][:2]
        gradient = made["backward"][0]
        dims = [q.block_scaling_dim for q in (activation, weight, gradient)]
        assert dims == [1, 2, 1]
        assert [q.amax_epsilon for q in (activation, weight, gradient)] == [
            pytest.approx(1e-4),
            pytest.approx(1e-4),
            0.0,
        ]
        assert all(q.force_pow_2_scales for q in (activation, weight, gradient))
        assert gradient.dtype == activation.dtype  # E4M3 both ways

    def test_a_checkpoint_is_loaded_again(self) -> None:
        """TE reads what its modules save as nothing to load, not as code that it refuses to run."""
        from transformer_engine.pytorch import _extra_state

        saved = pickle.dumps({"recipe": self.recipe(), "extra_fp8_variables": {"num_gemms": 1}})
        assert not _extra_state.should_load_extra_state_pickle(saved, "Linear")
        # The control: saved under our own class's name it is refused.
        ours = saved.replace(b"Float8BlockScaling", b"DSV3BlockScalings1")
        assert any(op.name == "STACK_GLOBAL" for op, _, _ in pickletools.genops(saved))
        with pytest.raises(RuntimeError, match="Refusing to load pickled"):
            _extra_state.should_load_extra_state_pickle(ours, "Linear")

    def test_recipe_suits_block_scaled_weights(self) -> None:
        """TE's own check of a weight's class against the recipe (`Recipe mismatch`) passes."""
        import transformer_engine_torch as tex
        from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

        quantizer = Float8BlockQuantizer(
            fp8_dtype=tex.DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=2
        )
        assert isinstance(self.recipe(), quantizer._get_compatible_recipe())
