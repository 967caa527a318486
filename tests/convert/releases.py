"""Small Hugging Face directories for the tests, written by transformers itself with weights of its own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

INDEX = "model.safetensors.index.json"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def micro(**overrides: Any) -> DeepseekV3Config:
    """Three layers (the first dense), 8 experts in 4 groups; sizes that do not divide 128."""
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "qk_nope_head_dim": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "num_nextn_predict_layers": 1,
    }
    return DeepseekV3Config(**settings | overrides)


def kimi_k2() -> DeepseekV3Config:
    """What Kimi K2 has and V3 has not; its model_type is `config.json`'s, see `named`."""
    rope = YARN | {"rope_theta": 50000.0, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0}
    return micro(
        n_group=1, topk_group=1, n_routed_experts=12, routed_scaling_factor=2.827, rope_parameters=rope,
        num_nextn_predict_layers=0,
    )  # fmt: skip


def moonlight() -> DeepseekV3Config:
    """What Moonlight-16B-A3B has and V3 has not."""
    return micro(
        n_group=1, topk_group=1, routed_scaling_factor=2.446, q_lora_rank=None, rms_norm_eps=1e-5, n_shared_experts=2,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0}, num_nextn_predict_layers=0,
    )  # fmt: skip


def v2_lite(**overrides: Any) -> DeepseekV2Config:
    """DeepSeek-V2-Lite in small: softmax gate, no groups, queries not compressed, YaRN with mscale 0.707."""
    of_v3 = micro(
        q_lora_rank=None, n_shared_experts=2, num_nextn_predict_layers=0, n_group=1, topk_group=1
    ).to_dict()
    names = set(DeepseekV2Config().to_dict()) - {"model_type", "head_dim", "qk_head_dim"}
    settings = {name: value for name, value in of_v3.items() if name in names}
    rope = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
    settings |= {"routed_scaling_factor": 1.0, "norm_topk_prob": False, "topk_method": "greedy"}
    return DeepseekV2Config(**settings | {"rope_parameters": rope} | overrides)


def named(folder: Path, **values: Any) -> None:
    """Change keys of a directory's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def release(
    folder: Path,
    config: DeepseekV3Config | DeepseekV2Config | None = None,
    mtp: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "40KB",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Write a directory; its tensors by released name.

    Every parameter is random, norms and routers' biases too. With `mtp` there is a layer after the last, of that
    layer's shapes, whatever `config` says of MTP.
    """
    config = config or micro()
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            _randomize(name, tensor, generator)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    model.save_pretrained(folder, max_shard_size=shard_size)
    if mtp:
        _add_mtp(folder, config.num_hidden_layers, dtype, generator)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    return tensors_of(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, by the safetensors library."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, Tensor], num_shards: int = 1) -> None:
    """Replace the directory's tensors."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        own = names[shard::num_shards]
        save_file({name: tensors[name].contiguous() for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def to_fp8(folder: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """Make the directory an FP8 one, block by block as the release was; the weights it then stands for, fp32.

    scale: factor on all of the blocks' scales, to have some whose largest number is not 448.
    """
    stored, meant = {}, {}
    for name, tensor in tensors_of(folder).items():
        if (name.endswith("_proj.weight") and "eh_proj" not in name) or "_with_mqa" in name:
            q, scales, value = _blockwise(tensor.float(), scale)
            stored[name], stored[name + "_scale_inv"], meant[name] = q, scales, value
        else:
            stored[name] = tensor
            meant[name] = tensor.float()
    rewrite(folder, stored, num_shards=3)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def _blockwise(weight: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    value = torch.empty_like(weight)
    rows, columns = (range(0, size, 128) for size in weight.shape)
    scales = torch.empty(len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            block = (slice(row, row + 128), slice(column, column + 128))
            scales[i, j] = weight[block].abs().max() / 448 * factor
            q[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            value[block] = q[block].float() * scales[i, j]
    return q, scales, value


def _randomize(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name.endswith(("norm.weight", "layernorm.weight")):
        tensor.uniform_(0.5, 1.5, generator=generator)
    elif name.endswith("e_score_correction_bias"):
        tensor.normal_(0, 0.1, generator=generator)
    else:
        tensor.normal_(0, 0.2, generator=generator)


def _add_mtp(folder: Path, layer: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """A shard more, with layer `layer`: what the layer before it has, and what is MTP's own."""
    tensors = tensors_of(folder)
    before, own = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    shapes = {name.replace(before, own): value.shape for name, value in tensors.items() if before in name}
    hidden = tensors["model.norm.weight"].shape[0]
    shapes |= {f"{own}{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    shapes[f"{own}eh_proj.weight"] = (hidden, 2 * hidden)
    shard = {}
    for name, shape in shapes.items():
        shard[name] = torch.empty(shape)
        _randomize(name, shard[name], generator)
        if not name.endswith("e_score_correction_bias"):
            shard[name] = shard[name].to(dtype)
    shard[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    shard[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    rewrite(folder, tensors | shard, num_shards=3)
