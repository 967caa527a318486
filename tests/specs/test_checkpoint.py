"""Sharded checkpoints of the reference backend: any layout loads another's; keys are Transformer Engine's."""

from typing import Any

import pytest
import torch

from dsv3_megatron.specs.init import initial_weight, initialize
from dsv3_megatron.specs.names import global_names, named_weights
from tests.harness import run_distributed
from tests.specs.models import build, micro_config

SAVED_SEED, OTHER_SEED = 1, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"expert_model_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
}


def model_of(layout: str, seed: int) -> Any:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel = LAYOUTS[layout]
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        **{name: size for name, size in parallel.items() if name.endswith("_size")}
    )
    model_parallel_cuda_manual_seed(7)
    model = build(micro_config(mtp_num_layers=1, **parallel))
    initialize(model, seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.arange(8) * 0.125 * seed)
    return model


def save_and_load(rank: int, world_size: int, source: str, target: str, folder: str) -> list[str]:
    """Save in one layout, load into other weights in another; the global names that were compared."""
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(model_of(source, SAVED_SEED).sharded_state_dict(), folder)
    model = model_of(target, OTHER_SEED)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    names = global_names(model)
    for local, loaded in named_weights(model).items():
        name, shard = names[local].name, names[local].shard
        if name.endswith("expert_bias"):
            expected = torch.arange(8) * 0.125 * SAVED_SEED
        else:
            full = initial_weight(
                name, shard.full_shape(loaded.shape), model.config.init_method_std, SAVED_SEED
            )
            expected = shard.take(full)
        assert torch.equal(loaded, expected), name
    return [entry.name for entry in names.values()]


@pytest.mark.parametrize(
    "source, target", [("ep2", "tp2"), pytest.param("tp2", "pp2", marks=pytest.mark.slow), ("pp2", "ep2")]
)
def test_one_layout_loads_anothers(source: str, target: str, tmp_path: Any) -> None:
    compared = run_distributed(
        save_and_load, world_size=2, source=source, target=target, folder=str(tmp_path)
    )
    assert "decoder.layers.1.mlp.experts.7.linear_fc1.weight" in set().union(*compared)
    assert "mtp.layers.0.mtp_model_layer.mlp.router.expert_bias" in set().union(*compared)


@pytest.mark.usefixtures("single_rank")
def test_keys_are_those_of_fused_modules() -> None:
    keys = {entry.key for entry in build(micro_config(mtp_num_layers=1)).sharded_state_dict().values()}
    for expected in (
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight",
        "decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.1.mlp.router.expert_bias",
        "mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2.weight",
    ):
        assert expected in keys, expected
