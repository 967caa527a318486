"""The Transformer Engine backend, constructed on CPU with TE's own modules and blockwise FP8; nothing is run.

Run with `make test-te`. Names, shapes and initial values of the parameters are the reference backend's.
"""

import importlib.util
import os
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.te,
    pytest.mark.usefixtures("single_rank"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None or os.environ.get("DSV3_TEST_TE") != "1",
        reason="needs Transformer Engine and DSV3_TEST_TE=1: `make test-te`",
    ),
]

FP8 = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
TE = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True, "bf16": True}
# Multiples of 128, the block size of the recipe; DeepSeek-V3's head sizes.
SIZES = {
    "num_layers": 3,
    "moe_layer_freq": [0, 1, 1],
    "mtp_num_layers": 1,
    "hidden_size": 256,
    "ffn_hidden_size": 384,
    "moe_ffn_hidden_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "params_dtype": torch.bfloat16,
}


def build_both(**overrides: Any) -> tuple[Any, Any]:
    from tests.specs.models import build, micro_config

    te = build(micro_config(**SIZES | TE | FP8 | overrides))
    return te, build(micro_config(**SIZES | overrides))


@pytest.mark.parametrize("overrides", [{}, {"q_lora_rank": None}], ids=["v3", "q_lora_none"])
def test_names_shapes_and_values_are_the_references(overrides: dict) -> None:
    from dsv3_megatron.specs.names import global_names, named_weights

    weights = []
    for model in build_both(**overrides):
        names = global_names(model)
        weights.append({names[local].name: weight for local, weight in named_weights(model).items()})
    te, reference = weights
    assert {name: tuple(w.shape) for name, w in te.items()} == {
        n: tuple(w.shape) for n, w in reference.items()
    }
    for name, weight in te.items():
        assert weight.dtype == reference[name].dtype, name
        assert torch.equal(weight.detach(), reference[name].detach()), name


def test_checkpoint_keys_are_the_references() -> None:
    te, reference = (
        {entry.key for entry in model.sharded_state_dict().values() if "_extra_state" not in entry.key}
        for model in build_both()
    )
    assert te == reference


def test_modules_are_transformer_engines() -> None:
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    model, _ = build_both()
    dense, moe = model.decoder.layers[0], model.decoder.layers[1]
    expected = {
        dense.input_layernorm: extension.te.pytorch.RMSNorm,
        dense.self_attention.linear_q_down_proj: extension.TELinear,
        dense.self_attention.linear_kv_up_proj: extension.TELayerNormColumnParallelLinear,
        dense.self_attention.core_attention: extension.TEDotProductAttention,
        dense.self_attention.linear_proj: extension.TERowParallelLinear,
        dense.mlp.linear_fc1: extension.TELayerNormColumnParallelLinear,
        moe.mlp.experts: TEGroupedMLP,
        moe.mlp.experts.linear_fc1: extension.TEColumnParallelGroupedLinear,
        moe.mlp.shared_experts.linear_fc1: extension.TEColumnParallelLinear,
        model.mtp.layers[0].mtp_model_layer.mlp.experts: TEGroupedMLP,
        model.mtp.layers[0].eh_proj: extension.TEColumnParallelLinear,
    }
    for module, kind in expected.items():
        assert isinstance(module, kind), f"{type(module)} is not {kind}"
    scale = dense.self_attention.softmax_scale
    assert scale == pytest.approx((128 + 64) ** -0.5)


def test_norms_of_the_latents_keep_their_epsilon() -> None:
    """TE has them inside the up projections, and reads their epsilon there at each forward pass."""
    from tests.specs.models import build, micro_config

    model = build(micro_config(**SIZES | TE | {"layernorm_epsilon": 1e-5}))
    attention = model.decoder.layers[1].self_attention
    assert (attention.linear_q_up_proj.eps, attention.linear_kv_up_proj.eps) == (1e-6, 1e-6)
    assert model.decoder.layers[0].mlp.linear_fc1.eps == 1e-5


def test_delayed_weight_gradients_reach_the_modules() -> None:
    from tests.specs.models import build, micro_config

    config = micro_config(**SIZES | TE | FP8)
    config.transformer.delay_wgrad_compute = True
    model = build(config)
    layer = model.decoder.layers[1]
    for linear in (
        layer.self_attention.linear_proj,
        layer.self_attention.linear_q_down_proj,
        layer.mlp.experts.linear_fc1,
        layer.mlp.shared_experts.linear_fc2,
    ):
        assert linear.wgrad_store.delay_wgrad_compute()
        assert all(p.skip_backward_post_hook for n, p in linear.named_parameters() if "layer_norm" not in n)
