"""Logits of both sides on the CPU in fp32: transformers' model of config.json, and the specs' reference backend."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_config import family_of
from dsv3_megatron.convert.hf_directory import HFDirectory

__all__ = [
    "PROMPTS",
    "check_kept",
    "free_memory",
    "megatron_model",
    "of_megatron",
    "of_transformers",
    "prompt_tokens",
    "transformer_fields",
    "transformers_model",
]

PROMPTS = (
    "The capital of France is",
    "def quicksort(numbers):\n    if len(numbers) <= 1:\n        return numbers\n",
    "Mixture-of-experts layers route each token to a few experts, so that",
    "三个臭皮匠，顶个诸葛亮。这句话的意思是",
)


def free_memory() -> int:
    """Bytes that processes can still have (Linux's MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConversionError("/proc/meminfo has no MemAvailable: use --no-logits")


def prompt_tokens(folder: Path, vocab_size: int, prompts: Sequence[str] | None) -> list[Tensor]:
    """Token ids int64 [1, s] of each prompt by the folder's tokenizer.

    Without a tokenizer the UTF-8 bytes serve as ids, modulo the vocabulary, and a line on stderr says so.
    """
    texts = prompts or PROMPTS
    path = folder / "tokenizer.json"
    if path.exists():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ConversionError(f"{path}: {error}") from error
        ids = [tokenizer.encode(text).ids for text in texts]
    else:
        print(f"verify: {path} is not there: bytes of the prompts serve as token ids", file=sys.stderr)
        ids = [[byte % vocab_size for byte in text.encode()] for text in texts]
    return [torch.tensor([tokens]) for tokens in ids]


@torch.no_grad()
def of_transformers(source: HFDirectory, tokens: Sequence[Tensor]) -> list[Tensor]:
    """fp32 logits [1, s, vocabulary] of transformers' model with this directory's weights, FP8 multiplied out."""
    weights = {
        name: source.tensor(name, torch.float32)
        for name in source.weights
        if not name.startswith(f"model.layers.{source.architecture.num_layers}.")
    }
    model = transformers_model(source.config, weights, source.folder)
    return [model(ids).logits for ids in tokens]


def transformers_model(config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> Any:
    """transformers' model of a config.json with these fp32 weights (released names), in evaluation mode.

    Raises:
        ConversionError: transformers is missing, or the weights are not the model's.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConversionError(
            "logits need transformers: pip install 'transformers>=4.53', or --no-logits"
        ) from error
    model_class = getattr(transformers, family_of(config).architecture)
    model, report = model_class.from_pretrained(
        None,
        config=model_class.config_class(**_settings(config)),
        state_dict=weights,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise ConversionError(f"{folder}: transformers could not load the weights: {wrong}")
    return model.eval()


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers' configuration class takes it: what names another class or its files left out."""
    names = ("model_type", "architectures", "auto_map", "quantization_config")
    settings = {key: value for key, value in config.items() if key not in names}
    for key in ("routed_scaling_factor", "rms_norm_eps"):  # the class is strict about 1 and 1.0
        settings[key] = float(settings[key])
    return settings


@torch.no_grad()
def of_megatron(arch: Architecture, checkpoint: Path, tokens: Sequence[Tensor]) -> list[Tensor]:
    """fp32 logits [1, s, vocabulary] of the specs' model with a checkpoint's weights."""
    with megatron_model(arch, checkpoint) as model:
        return [model(ids, torch.arange(ids.shape[1])[None], attention_mask=None) for ids in tokens]


@contextmanager
def megatron_model(arch: Architecture, checkpoint: Path, **more: Any) -> Iterator[Any]:
    """The specs' model in fp32 in this process, in evaluation mode, its weights loaded by Megatron itself.

    torch.distributed must not be initialised: it is, with one rank, while the model lives.

    Args:
        more: further fields of Megatron's configuration, or other values than `transformer_fields` has.
    """
    from dsv3_megatron import cpu

    warnings.filterwarnings("ignore", module="megatron")  # about what it lacks for training
    cpu.activate()
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsv3_megatron.specs.builder import DSV3ModelBuilder, DSV3ModelConfig

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        fields = transformer_fields(arch) | more
        config = DSV3ModelConfig(
            transformer=MLATransformerConfig(**fields),
            vocab_size=arch.vocab_size,
            seq_length=arch.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rotary_base,
        )
        check_kept(fields, config.transformer)
        model = DSV3ModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
        wanted = {"model": model.sharded_state_dict(metadata={"non_homogeneous_layers": True})}
        model.load_state_dict(dist_checkpointing.load(wanted, str(checkpoint))["model"])
        model.eval()
        yield model
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def check_kept(fields: dict[str, Any], config: Any) -> None:
    """Raise `ConversionError` where a field was lost.

    Megatron's model configuration writes its own defaults over fields of that name in the transformer's.
    """
    lost = {name: getattr(config, name) for name, value in fields.items() if getattr(config, name) != value}
    if lost:
        raise ConversionError(f"Megatron's model was to be built with other values than {lost}")


def transformer_fields(arch: Architecture) -> dict[str, Any]:
    """Fields of Megatron's MLATransformerConfig for one process of the reference backend in fp32."""
    moe_layers = [int(arch.is_moe(layer)) for layer in range(arch.num_layers)]
    fields: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "multi_latent_attention": True,
        "q_lora_rank": arch.q_lora_rank,
        "kv_lora_rank": arch.kv_lora_rank,
        "qk_head_dim": arch.qk_head_dim,
        "qk_pos_emb_head_dim": arch.qk_pos_emb_head_dim,
        "v_head_dim": arch.v_head_dim,
        "qk_layernorm": True,
        "rotary_base": arch.rotary_base,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.layernorm_epsilon,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "mtp_num_layers": arch.mtp_num_layers or None,
        "transformer_impl": "local",
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "params_dtype": torch.float32,
        "perform_initialization": False,
    }
    if any(moe_layers):
        fields |= {
            "num_moe_experts": arch.num_experts,
            "moe_layer_freq": moe_layers,
            "moe_ffn_hidden_size": arch.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": arch.num_shared_experts * arch.moe_ffn_hidden_size,
            "moe_router_topk": arch.moe_router_topk,
            "moe_router_num_groups": arch.moe_router_num_groups,
            "moe_router_group_topk": arch.moe_router_group_topk,
            "moe_router_score_function": arch.moe_router_score_function,
            "moe_router_pre_softmax": arch.moe_router_score_function == "softmax",
            "moe_router_topk_scaling_factor": arch.moe_router_topk_scaling_factor,
            "moe_router_enable_expert_bias": arch.has_expert_bias,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall",
        }
    if arch.yarn is None:
        return fields | {
            "rope_type": "rope",
            "rotary_scaling_factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    yarn = dict(vars(arch.yarn))
    return fields | {"rope_type": "yarn", "rotary_scaling_factor": yarn.pop("factor"), **yarn}
