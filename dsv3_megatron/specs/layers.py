"""The layers of DeepSeek-V3 as Megatron ModuleSpecs, the same for every backend and every pipeline stage."""

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import (
    MlpBuilder,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from dsv3_megatron.backends.backend import Backend
from dsv3_megatron.specs.deployment import alone, deployment_of
from dsv3_megatron.specs.expert_slots import with_slots
from dsv3_megatron.specs.moe_layer import moe_layer_of
from dsv3_megatron.specs.router import DSV3Router
from dsv3_megatron.specs.select import select_backend

__all__ = ["decoder_block", "layer_spec", "moe_layer_pattern", "mtp_block"]


def moe_layer_pattern(config: MLATransformerConfig) -> list[bool]:
    """For every layer of the whole model, in order: is it MoE? From num_moe_experts and moe_layer_freq.

    DeepSeek-V3: `--moe-layer-freq ([0]*3+[1]*58)`. An integer n means an MoE layer at every n-th position
    from 0.

    Raises:
        ValueError: the list's length is not num_layers.
    """
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    freq = config.moe_layer_freq
    if isinstance(freq, int):
        return [index % freq == 0 for index in range(config.num_layers)]
    if len(freq) != config.num_layers:
        raise ValueError(
            f"--moe-layer-freq has {len(freq)} entries, --num-layers is {config.num_layers}; give one 0 "
            "(dense) or 1 (MoE) per layer, e.g. ([0]*3+[1]*58) for 61 layers"
        )
    return [bool(entry) for entry in freq]


def attention_spec(config: MLATransformerConfig, backend: Backend) -> ModuleSpec:
    """MLA (report §2.1.1): queries, keys and values compressed, normalised, expanded; rope kept apart."""
    fused = backend.norm_column is not None
    up_proj = backend.norm_column or backend.column
    norm = IdentityOp if fused else backend.norm
    compressed_query = config.q_lora_rank is not None
    return ModuleSpec(
        module=backend.self_attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column,
            linear_q_down_proj=backend.duplicated,
            linear_q_up_proj=up_proj,
            q_layernorm=norm if compressed_query else IdentityOp,
            linear_kv_down_proj=backend.duplicated,
            linear_kv_up_proj=up_proj,
            kv_layernorm=norm,
            core_attention=backend.core_attention,
            linear_proj=backend.attention_output,
        ),
    )


def dense_mlp(config: MLATransformerConfig, backend: Backend) -> MlpBuilder:
    """SwiGLU MLP of the first layers; where the backend fuses, its first linear layer holds the norm."""
    fc1 = backend.norm_column or backend.column
    submodules = MLPSubmodules(linear_fc1=fc1, linear_fc2=backend.down_projection)
    builder = partial(backend.mlp.as_mlp_submodule, submodules=submodules)
    return _whole(builder) if deployment_of(config).whole_mlps else builder


def _whole(builder: Any) -> Any:
    """The builder of a module that is to be whole on every tensor-parallel rank."""

    def build(*, config: Any, pg_collection: Any, **options: Any) -> Any:
        own_config, own_groups = alone(config, pg_collection)
        return builder(config=own_config, pg_collection=own_groups, **options)

    return build


def moe_mlp(config: MLATransformerConfig, backend: Backend) -> MlpBuilder:
    """DeepSeekMoE (report §2.1.2): router, dispatcher, routed experts, shared experts."""
    shared = MLPSubmodules(linear_fc1=backend.column, linear_fc2=backend.down_projection)
    shared_experts = partial(backend.shared_expert, submodules=shared)
    deployment = deployment_of(config)
    layer = moe_layer_of(config, backend)
    return partial(
        with_slots(layer) if deployment.has_slots else layer,
        submodules=MoESubmodules(
            router=DSV3Router,
            experts=backend.routed_experts,
            shared_experts=_whole(shared_experts) if deployment.whole_mlps else shared_experts,
        ),
    )


def layer_spec(config: MLATransformerConfig, backend: Backend, moe: bool) -> ModuleSpec:
    """One transformer layer, dense or MoE."""
    norm_in_mlp = backend.norm_column is not None and not moe
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=attention_spec(config, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if norm_in_mlp else backend.norm,
            mlp=moe_mlp(config, backend) if moe else dense_mlp(config, backend),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(backend.moe_keys if moe else backend.dense_keys),
        ),
    )


def decoder_block(config: MLATransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this rank's chunk `vp_stage`; dense or MoE follows a layer's number in the model."""
    backend = select_backend(config)
    if config.pipeline_model_parallel_layout is not None:
        layer_ids = config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage
        )
    else:
        offset = get_transformer_layer_offset(config, vp_stage)
        layer_ids = range(offset, offset + get_num_layers_to_build(config, vp_stage))
    pattern = moe_layer_pattern(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, backend, moe=pattern[index]) for index in layer_ids],
        layer_norm=backend.norm,
    )


def mtp_block(
    config: MLATransformerConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The MTP layers (report §2.2), or None where this chunk has none; each like the last layer.

    Megatron's MTP layer concatenates [enorm(embedding); hnorm(hidden)], as the released weights have it,
    takes the hidden states after the main model's final norm, has its own final norm, and shares embedding
    and output head.
    """
    if not config.mtp_num_layers or get_mtp_num_layers_to_build(config, vp_stage) == 0:
        return None
    backend = select_backend(config)
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=backend.norm,
            hnorm=backend.norm,
            eh_proj=backend.column,
            mtp_model_layer=layer_spec(config, backend, moe=moe_layer_pattern(config)[-1]),
            layer_norm=backend.norm,
        ),
    )
    count = 1 if config.mtp_use_repeated_layer else config.mtp_num_layers
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * count)
