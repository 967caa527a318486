"""The functions that Megatron calls: `--spec dsv3_megatron.specs dsv3`, and its counterpart for MTP."""

import functools
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.models.gpt import GPTModelConfig

from dsv3_megatron.fp8 import policy
from dsv3_megatron.patching import install
from dsv3_megatron.specs.init import initialize
from dsv3_megatron.specs.layers import decoder_block, mtp_block

__all__ = ["dsv3", "mtp_spec"]

# Megatron takes the MTP block from elsewhere; losses are the same in every layout and after a resume.
install(["mtp_block_spec", "mtp_loss", "mtp_loss_logging", "dataset_loss_mask"])


def dsv3(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Decoder spec of a DeepSeek-V3-class model, for this rank's pipeline stage.

    Args:
        config: Megatron's model configuration; `config.transformer.transformer_impl` chooses the backend:
            "local" is plain PyTorch, "transformer_engine" is Transformer Engine.
        vp_stage: index of the model chunk on this rank, None without virtual pipelining.

    Raises:
        ValueError: the configuration contradicts DeepSeek-V3's architecture; the message names the flag to
            change.
    """
    _check(config.transformer)
    policy.announce(config.transformer)
    _initialize_by_name(config)
    return decoder_block(config.transformer, vp_stage)


def mtp_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """Spec of the multi-token-prediction block that belongs to `dsv3`; None where this chunk has none."""
    return mtp_block(config.transformer, vp_stage)


def _check(config: Any) -> None:
    """What the layers rely on; the full table of refused arguments is in dsv3_megatron.arguments."""
    requirements = [
        (isinstance(config, MLATransformerConfig), "--spec dsv3 needs --multi-latent-attention"),
        (
            config.qk_layernorm,
            "--spec dsv3 needs --qk-layernorm (the norms on compressed queries and keys/values)",
        ),
        (config.normalization == "RMSNorm", "--spec dsv3 needs --normalization RMSNorm"),
        (not config.add_bias_linear, "--spec dsv3 needs --disable-bias-linear"),
        (config.gated_linear_unit, "--spec dsv3 needs --swiglu"),
        (
            config.tensor_model_parallel_size == 1 or config.sequence_parallel,
            f"--tensor-model-parallel-size {config.tensor_model_parallel_size} needs --sequence-parallel: "
            "without it the shared rope key's gradient is not summed over the tensor-parallel ranks",
        ),
    ]
    for holds, message in requirements:
        if not holds:
            raise ValueError(message)


def _initialize_by_name(config: GPTModelConfig) -> None:
    """Under Megatron's own builder (unpatched pretrain_gpt.py), replace its initial weights by ours.

    `DSV3ModelBuilder` does it by itself.
    """
    if getattr(config, "initializes_by_name", False) or not config.transformer.perform_initialization:
        return
    if _initialize_chunks not in (getattr(hook, "func", None) for hook in config.pre_wrap_hooks):
        from megatron.training import get_args

        config.pre_wrap_hooks.append(functools.partial(_initialize_chunks, seed=get_args().seed))


def _initialize_chunks(model: list[torch.nn.Module], seed: int) -> list[torch.nn.Module]:
    for chunk in model:
        initialize(chunk, seed)
    return model
