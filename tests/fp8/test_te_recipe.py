"""The recipe in Transformer Engine's terms: settings by role, detection by feature, real TE where installed."""

import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dsv3_megatron.fp8 import te_recipe
from dsv3_megatron.fp8.te_recipe import FP32_SCALES, Settings, settings_of


def role(module_type: str, tensor_type: str, name: str = "") -> SimpleNamespace:
    return SimpleNamespace(module_type=module_type, tensor_type=tensor_type, name=name)


@pytest.mark.parametrize("form", ["object", "string"])
def test_settings(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FP32_SCALES, "1")

    def of(tensor: str) -> Settings:
        return settings_of(role("linear", tensor) if form == "object" else f"linear_{tensor}")

    assert of("weight") == (2, 1e-4, False)
    assert of("input") == (1, 1e-4, False)
    assert of("grad_output") == (1, 0.0, False)
    monkeypatch.delenv(FP32_SCALES)
    assert all(of(tensor).force_pow_2_scales for tensor in ("weight", "input", "grad_output"))


def test_powers_of_two_where_the_report_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FP32_SCALES, "1")
    name = "decoder.layers.3.self_attention.linear_proj"
    assert settings_of(role("linear", "input", name)).force_pow_2_scales
    assert settings_of(role("grouped_linear", "grad_output")).force_pow_2_scales
    assert settings_of(None) == (1, 1e-4, False)


def fake_te(
    monkeypatch: pytest.MonkeyPatch, custom_recipe: bool = True, dtype_in_constants: bool = True
) -> None:
    """Transformer Engine's modules as far as they are looked into."""
    dtypes = SimpleNamespace(kFloat8E4M3="e4m3")
    contents: dict[str, dict] = {
        "transformer_engine": {},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {"CustomRecipe": object} if custom_recipe else {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.tensor.float8_blockwise_tensor": {"Float8BlockQuantizer": dict},
        "transformer_engine.pytorch.constants": {"DType": dtypes} if dtype_in_constants else {},
        "transformer_engine_torch": {"DType": dtypes},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("dtype_in_constants", [True, False])
def test_quantizer(monkeypatch: pytest.MonkeyPatch, dtype_in_constants: bool) -> None:
    fake_te(monkeypatch, dtype_in_constants=dtype_in_constants)
    quantizer = te_recipe.dsv3(role("linear", "weight"))
    assert quantizer["fp8_dtype"] == "e4m3" and quantizer["block_scaling_dim"] == 2
    assert quantizer["rowwise"] and quantizer["columnwise"]


def test_features_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_te(monkeypatch)
    assert te_recipe.lacking() == ""
    fake_te(monkeypatch, custom_recipe=False)
    assert te_recipe.lacking() == "CustomRecipe"


@pytest.mark.te
@pytest.mark.usefixtures("single_rank")
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None or os.environ.get("DSV3_TEST_TE") != "1",
    reason="needs Transformer Engine and DSV3_TEST_TE=1: `make test-te`",
)
class TestTransformerEngine:
    """Constructed on CPU, nothing is run."""

    def test_quantizers(self) -> None:
        assert te_recipe.lacking() == ""
        weight, gradient = (te_recipe.dsv3(role("linear", kind)) for kind in ("weight", "grad_output"))
        assert (weight.block_scaling_dim, gradient.block_scaling_dim) == (2, 1)
        assert (weight.amax_epsilon, gradient.amax_epsilon) == (pytest.approx(1e-4), 0.0)

    def test_megatron_finds_the_recipe(self) -> None:
        from megatron.core.fp8_utils import get_fp8_recipe

        from dsv3_megatron.fp8.precision import FACTORIES

        config = SimpleNamespace(
            fp8="e4m3", fp8_recipe="custom", fp8_quantizer_factory=FACTORIES + "dsv3", fp4=None
        )
        assert get_fp8_recipe(config).qfactory is te_recipe.dsv3

    def test_policy_on_real_modules(self) -> None:
        """FP8 modules of TE are those that the policy has in E4M3, and dispatch is FP8's."""
        from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

        from dsv3_megatron.fp8 import policy
        from dsv3_megatron.fp8.attention_output import KeepsInputInE5M6
        from dsv3_megatron.fp8.dispatch import FP8AlltoAllTokenDispatcher, FP8MoELayer
        from dsv3_megatron.fp8.precision import FACTORIES
        from tests.specs.models import build, micro_config
        from tests.specs.test_te import SIZES, TE

        fp8 = {"fp8": "e4m3", "fp8_recipe": "custom", "fp8_quantizer_factory": FACTORIES + "dsv3"}
        model = build(micro_config(**SIZES | TE | fp8))
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is None:
                continue
            row = policy.row_of(name)
            assert row is not None, name
            assert isinstance(module, TransformerEngineBaseModule) == row.fp8, (name, type(module))
        layers = [module for module in model.modules() if isinstance(module, FP8MoELayer)]
        assert layers and all(isinstance(m.token_dispatcher, FP8AlltoAllTokenDispatcher) for m in layers)
        attentions = [m.self_attention for m in model.modules() if hasattr(m, "self_attention")]
        assert len(attentions) == 4
        for attention in attentions:
            linear: Any = attention.linear_proj
            # Megatron lets it keep its input as it is, which E5M6 then replaces.
            assert linear.save_original_input and isinstance(linear, KeepsInputInE5M6)
