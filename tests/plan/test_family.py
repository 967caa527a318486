"""The family's configurations: published parameter counts, the release's own config.json, and that they are planned."""

from typing import Any

import pytest
import yaml

from dsv3_megatron.conf import compose
from dsv3_megatron.conf.compose import groups
from dsv3_megatron.convert.__main__ import hydra_model
from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.plan.counting import count_parameters, moe_pattern
from dsv3_megatron.plan.from_config import from_config

# What the three config.json on Hugging Face say (moonshotai/Kimi-K2-Instruct, moonshotai/Moonlight-16B-A3B,
# deepseek-ai/DeepSeek-V2-Lite), but for keys without effect.
V2_LITE_SIZES: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "moe_layer_freq": 1,
}  # fmt: skip
GATE = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "kimi_k2": {
        "model_type": "kimi_k2", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 64,
        "num_key_value_heads": 64, "first_k_dense_replace": 1, "intermediate_size": 18432, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "rope_theta": 50000.0, "rms_norm_eps": 1e-6,
        "vocab_size": 163840, "max_position_embeddings": 131072, "moe_layer_freq": 1, **GATE,
        "rope_scaling": {
            "type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "moonlight_16b": {
        "model_type": "deepseek_v3", **V2_LITE_SIZES, **GATE, "intermediate_size": 11264, "vocab_size": 163840,
        "rope_theta": 50000.0, "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446, "max_position_embeddings": 8192,
    },
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2", **V2_LITE_SIZES, "intermediate_size": 10944, "vocab_size": 102400,
        "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "rope_theta": 10000, "rms_norm_eps": 1e-6, "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip
LAYOUTS = {"kimi_k2": "pp16_ep64", "moonlight_16b": "pp8_ep8", "deepseek_v2_lite": "pp8_ep8"}
# Parameters, routers' biases included: all that the safetensors of the release hold, and what the reports round to.
TOTALS = {"kimi_k2": 1_026_408_232_448, "moonlight_16b": 15_960_110_208, "deepseek_v2_lite": 15_706_484_224}
REPORTED = {"kimi_k2": 1.03e12, "moonlight_16b": 15.96e9, "deepseek_v2_lite": 15.7e9}
ACTIVE = {
    "kimi_k2": (32.6e9, 0.02),
    "deepseek_v2_lite": (2.4e9, 0.12),
}  # with how far reports' own rounding goes


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_the_published_totals(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cfg = compose([f"model={name}", f"layout={LAYOUTS[name]}"])
    counts, pattern = count_parameters(cfg, 1), moe_pattern(cfg)
    total = counts.total(len(pattern) - sum(pattern), sum(pattern), 0)
    biases = sum(pattern) * cfg.num_experts if name != "deepseek_v2_lite" else 0
    assert total + biases == TOTALS[name]
    assert total == pytest.approx(REPORTED[name], rel=5e-3)
    if name == "moonlight_16b":  # arXiv 2502.16982: 15.29B without embedding and head, 2.24B of them active
        ends = sum(counts.embedding.values()) + counts.head["output_head"]
        assert total - ends == pytest.approx(15.29e9, rel=1e-3)
    experts = sum(pattern) * counts.moe["routed_experts"]
    active = total - experts + experts * cfg.moe_router_topk / cfg.num_experts
    if name in ACTIVE:
        reported, rounding = ACTIVE[name]
        assert active == pytest.approx(reported, rel=rounding)


@pytest.mark.parametrize("name", CONFIGS)
def test_model_is_that_of_the_released_config(name: str) -> None:
    """What conversion prints for it is the repository's file, but for YaRN and what no config.json says."""
    arch = Architecture.from_hf(CONFIGS[name], 0)
    printed = yaml.safe_load(hydra_model(arch.arguments()))
    cfg = compose([f"model={name}", f"layout={LAYOUTS[name]}"])
    of_yarn = {"rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"}
    assert (arch.yarn is not None) == (CONFIGS[name].get("rope_scaling") is not None)
    for key, value in printed.items():
        if key in of_yarn | {"max_position_embeddings", "defaults"}:
            continue
        wanted = float(value) if key == "norm_epsilon" else value
        assert cfg[key] == wanted, key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_job_is_planned(name: str) -> None:
    """Through the trainer's own refusals and Megatron's validation."""
    cfg = compose([f"model={name}", "layout=pp8_ep8", "global_batch_size=1024", "batch_ramp=null"])
    planned = from_config(cfg, load_imbalance=1.0)
    assert planned.job.moe_router_num_groups == 1
    assert sum(stage.dense + stage.moe for stage in planned.job.stages) == CONFIGS[name]["num_hidden_layers"]


def test_every_model_composes_with_a_layout() -> None:
    for model in groups()["model"]:
        compose([f"model={model}", "layout=cpu_pp2_ep2"])
