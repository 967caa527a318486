"""Micro DeepSeek-V3 models for the tests of the specs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from dsv3_megatron.backends.linear import num_pending_weight_grads, run_pending_weight_grads
from dsv3_megatron.specs.builder import DSV3ModelBuilder, DSV3ModelConfig

VOCAB_SIZE = 96


def micro_config(vocab_size: int = VOCAB_SIZE, seed: int = 1234, **overrides: Any) -> DSV3ModelConfig:
    """Two layers (dense, MoE), 8 experts in 4 groups, one shared expert, fp32; every MLATransformerConfig
    field can be overridden by name.
    """
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "multi_latent_attention": True,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_head_dim": 16,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 12,
        "qk_layernorm": True,
        "rope_type": "rope",
        "rotary_base": 10000,
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.02,
        "num_moe_experts": 8,
        "moe_layer_freq": [0, 1],
        "moe_ffn_hidden_size": 20,
        "moe_shared_expert_intermediate_size": 20,
        "moe_router_topk": 3,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-3,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-4,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "transformer_impl": "local",
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "params_dtype": torch.float32,
    }
    fields.update(overrides)
    return DSV3ModelConfig(
        transformer=MLATransformerConfig(**fields),
        vocab_size=vocab_size,
        seq_length=128,
        position_embedding_type="rope",
        seed=seed,
    )


def build(config: DSV3ModelConfig, vp_stage: int | None = None) -> GPTModel:
    """One chunk of the model on this rank; Megatron's model-parallel groups must exist."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return DSV3ModelBuilder(config).build_model(groups, vp_stage=vp_stage)


def gradients_of(config: DSV3ModelConfig, delay: bool, seeds: Sequence[int] = (0, 1)) -> dict[str, Tensor]:
    """Gradient of every weight from a microbatch per seed, all of them in flight before the first backward pass."""
    config.transformer.delay_wgrad_compute = delay
    model = build(config)
    losses = [model(**random_batch(seed=seed), attention_mask=None).mean() for seed in seeds]
    for loss in losses:
        loss.backward()
    while num_pending_weight_grads(model):
        run_pending_weight_grads(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def random_batch(
    batch: int = 2, seq: int = 16, vocab_size: int = VOCAB_SIZE, seed: int = 0
) -> dict[str, torch.Tensor]:
    """input_ids, labels (the next tokens), position_ids: int64 [batch, seq]; attention_mask None."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch, seq + 1), generator=generator)
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(seq).expand(batch, seq).contiguous(),
    }
