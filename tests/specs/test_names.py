"""Global names and the names of released checkpoints."""

from types import SimpleNamespace

import pytest
import torch

from dsv3_megatron.convert.hf_names import from_hf, to_hf
from dsv3_megatron.specs.names import global_names
from tests.specs.models import build, micro_config

# deepseek-ai/DeepSeek-V3, model.safetensors.index.json: 61 layers, 3 dense, MTP as layer 61.
RELEASED = {
    "model.embed_tokens.weight": ("embedding.word_embeddings.weight", 0),
    "model.norm.weight": ("decoder.final_layernorm.weight", 0),
    "lm_head.weight": ("output_layer.weight", 0),
    "model.layers.0.input_layernorm.weight": ("decoder.layers.0.input_layernorm.weight", 0),
    "model.layers.60.post_attention_layernorm.weight": ("decoder.layers.60.pre_mlp_layernorm.weight", 0),
    "model.layers.7.self_attn.q_a_proj.weight": (
        "decoder.layers.7.self_attention.linear_q_down_proj.weight",
        0,
    ),
    "model.layers.7.self_attn.q_a_layernorm.weight": (
        "decoder.layers.7.self_attention.q_layernorm.weight",
        0,
    ),
    "model.layers.7.self_attn.q_b_proj.weight": (
        "decoder.layers.7.self_attention.linear_q_up_proj.weight",
        0,
    ),
    "model.layers.7.self_attn.kv_a_proj_with_mqa.weight": (
        "decoder.layers.7.self_attention.linear_kv_down_proj.weight",
        0,
    ),
    "model.layers.7.self_attn.kv_a_layernorm.weight": (
        "decoder.layers.7.self_attention.kv_layernorm.weight",
        0,
    ),
    "model.layers.7.self_attn.kv_b_proj.weight": (
        "decoder.layers.7.self_attention.linear_kv_up_proj.weight",
        0,
    ),
    "model.layers.7.self_attn.o_proj.weight": ("decoder.layers.7.self_attention.linear_proj.weight", 0),
    "model.layers.2.mlp.gate_proj.weight": ("decoder.layers.2.mlp.linear_fc1.weight", 0),
    "model.layers.2.mlp.up_proj.weight": ("decoder.layers.2.mlp.linear_fc1.weight", 1),
    "model.layers.2.mlp.down_proj.weight": ("decoder.layers.2.mlp.linear_fc2.weight", 0),
    "model.layers.3.mlp.gate.weight": ("decoder.layers.3.mlp.router.weight", 0),
    "model.layers.3.mlp.gate.e_score_correction_bias": ("decoder.layers.3.mlp.router.expert_bias", 0),
    "model.layers.3.mlp.experts.255.up_proj.weight": (
        "decoder.layers.3.mlp.experts.255.linear_fc1.weight",
        1,
    ),
    "model.layers.3.mlp.experts.0.down_proj.weight": ("decoder.layers.3.mlp.experts.0.linear_fc2.weight", 0),
    "model.layers.3.mlp.shared_experts.gate_proj.weight": (
        "decoder.layers.3.mlp.shared_experts.linear_fc1.weight",
        0,
    ),
    "model.layers.61.embed_tokens.weight": ("embedding.word_embeddings.weight", 0),
    "model.layers.61.enorm.weight": ("mtp.layers.0.enorm.weight", 0),
    "model.layers.61.hnorm.weight": ("mtp.layers.0.hnorm.weight", 0),
    "model.layers.61.eh_proj.weight": ("mtp.layers.0.eh_proj.weight", 0),
    "model.layers.61.shared_head.norm.weight": ("mtp.layers.0.final_layernorm.weight", 0),
    "model.layers.61.shared_head.head.weight": ("output_layer.weight", 0),
    "model.layers.61.input_layernorm.weight": ("mtp.layers.0.mtp_model_layer.input_layernorm.weight", 0),
    "model.layers.61.mlp.experts.9.gate_proj.weight": (
        "mtp.layers.0.mtp_model_layer.mlp.experts.9.linear_fc1.weight",
        0,
    ),
}
COPIES = ("model.layers.61.embed_tokens.weight", "model.layers.61.shared_head.head.weight")


@pytest.mark.parametrize("name", RELEASED)
def test_released_names(name: str) -> None:
    ours, part = RELEASED[name]
    assert from_hf(name, num_layers=61) == (ours, part)
    if name not in COPIES:
        assert to_hf(ours, num_layers=61)[part] == name


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.3.enorm.weight", "transformer.wte.weight"],
)
def test_unknown_released_name_is_an_error(name: str) -> None:
    with pytest.raises(KeyError, match="not a tensor of a DeepSeek-V3 checkpoint"):
        from_hf(name, num_layers=61)


def test_unknown_global_name_is_an_error() -> None:
    with pytest.raises(KeyError, match="not a global parameter name"):
        to_hf("encoder.weight", num_layers=61)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("overrides", [{"mtp_num_layers": 2}, {"q_lora_rank": None}])
def test_there_and_back_for_every_weight_of_a_model(overrides: dict) -> None:
    names = [entry.name for entry in global_names(build(micro_config(**overrides))).values()]
    assert len(set(names)) == len(names)
    for name in names:
        for part, released in enumerate(to_hf(name, num_layers=2)):
            assert from_hf(released, num_layers=2) == (name, part)


class TransformerEngineLike(torch.nn.Module):
    """The module paths of Transformer Engine's layers: 5 is dense, 6 is MoE with experts 4 and 5."""

    def __init__(self) -> None:
        super().__init__()
        one_rank = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
        self.pg_collection = SimpleNamespace(tp=one_rank, expt_tp=one_rank)
        self.config = SimpleNamespace(num_moe_experts=8)
        paths = [
            "0.mlp.linear_fc1.layer_norm_weight",
            "0.self_attention.linear_q_up_proj.layer_norm_weight",
            "0.self_attention.linear_kv_up_proj.layer_norm_weight",
            "1.mlp.experts.linear_fc1.weight0",
            "1.mlp.experts.linear_fc1.weight1",
            "1.mlp.experts.linear_fc2.weight1",
            "1.mlp.shared_experts.linear_fc1.weight",
        ]
        for path in paths:
            *modules, parameter = f"decoder.layers.{path}".split(".")
            module: torch.nn.Module = self
            for name in modules:
                if not hasattr(module, name):
                    module.add_module(name, torch.nn.Module())
                module = getattr(module, name)
            module.register_parameter(parameter, torch.nn.Parameter(torch.zeros(1)))
        layers = [self.decoder.layers.get_submodule(str(index)) for index in (0, 1)]
        for number, layer in enumerate(layers, start=6):
            layer.layer_number = number
        layers[1].mlp.local_expert_indices = [4, 5]
        self.decoder.layers = torch.nn.ModuleList(layers)


def test_fused_and_grouped_modules_have_the_reference_names() -> None:
    assert {local: entry.name for local, entry in global_names(TransformerEngineLike()).items()} == {
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "decoder.layers.5.pre_mlp_layernorm.weight",
        "decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight": (
            "decoder.layers.5.self_attention.q_layernorm.weight"
        ),
        "decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight": (
            "decoder.layers.5.self_attention.kv_layernorm.weight"
        ),
        "decoder.layers.1.mlp.experts.linear_fc1.weight0": "decoder.layers.6.mlp.experts.4.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.linear_fc1.weight1": "decoder.layers.6.mlp.experts.5.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.linear_fc2.weight1": "decoder.layers.6.mlp.experts.5.linear_fc2.weight",
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight": (
            "decoder.layers.6.mlp.shared_experts.linear_fc1.weight"
        ),
    }
