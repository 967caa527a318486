"""Initial weights depend on the seed and the global name only: any layout, either builder."""

import functools
from types import SimpleNamespace
from typing import Any

import megatron.training
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor

from dsv3_megatron.specs import dsv3
from dsv3_megatron.specs.init import initial_weight
from dsv3_megatron.specs.names import Shard, global_names, named_weights
from tests.harness import run_distributed
from tests.specs.models import VOCAB_SIZE, build, micro_config

MODEL: dict[str, Any] = {"num_layers": 4, "moe_layer_freq": [0, 1, 1, 1], "mtp_num_layers": 1}


def test_stable_across_versions() -> None:
    """Checkpoints and comparisons rely on these values; no change of Python, torch or code may move them."""
    weight = initial_weight("decoder.layers.3.mlp.experts.17.linear_fc1.weight", (4, 8), std=0.006, seed=1234)
    expected = torch.tensor([[-0.0168665871, -0.0023497751, 0.0013786237, -0.0010119241]])
    torch.testing.assert_close(weight[:1, :4], expected, rtol=1e-5, atol=0)


def test_distribution() -> None:
    weight = initial_weight("output_layer.weight", (500, 400), std=0.006, seed=1)
    assert abs(weight.mean().item()) < 5e-5 and abs(weight.std().item() / 0.006 - 1) < 0.01
    assert torch.equal(initial_weight("decoder.final_layernorm.weight", (8,), 0.006, 1), torch.ones(8))
    assert torch.equal(
        initial_weight("decoder.layers.1.mlp.router.expert_bias", (8,), 0.006, 1), torch.zeros(8)
    )


def test_padding_the_vocabulary_keeps_the_first_rows() -> None:
    short, long = (initial_weight("output_layer.weight", (rows, 9), 0.006, 1) for rows in (25, 32))
    assert torch.equal(short, long[:25])


def test_every_name_and_seed_has_its_own_values() -> None:
    draws = {
        tuple(initial_weight(f"decoder.layers.{layer}.{module}.weight", (4,), 1.0, seed).tolist())
        for layer in range(3)
        for module in ("mlp.linear_fc1", "mlp.linear_fc2")
        for seed in (0, 1)
    }
    assert len(draws) == 12


@pytest.mark.parametrize(
    "shape, dim, count, blocks", [((8, 3), 0, 4, 1), ((8, 3), 0, 2, 2), ((3, 8), 1, 4, 1)]
)
def test_shards_join_to_the_full_tensor(shape: tuple, dim: int, count: int, blocks: int) -> None:
    full = torch.arange(24).view(shape)
    shards = [Shard(dim, index, count, blocks) for index in range(count)]
    parts = [shard.take(full) for shard in shards]
    assert shards[0].full_shape(parts[0].shape) == shape
    assert torch.equal(Shard.join(parts, shards[0]), full)
    if blocks == 2:  # gate rows 0–3 and up rows 4–7 are split separately
        assert parts[1][:, 0].tolist() == [6, 9, 18, 21]


def weights_of_rank(rank: int, world_size: int, parallel: dict[str, Any]) -> dict[str, tuple[Shard, Tensor]]:
    """Global name → shard and initial values of what this rank holds, all virtual stages together."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    sizes = ("tensor", "pipeline", "virtual_pipeline")
    groups = {f"{s}_model_parallel_size": parallel.get(f"{s}_model_parallel_size") for s in sizes}
    parallel_state.initialize_model_parallel(
        **{name: size for name, size in groups.items() if size},
        expert_model_parallel_size=parallel.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=parallel.get("expert_tensor_parallel_size"),
    )
    model_parallel_cuda_manual_seed(100 + rank)
    held = {}
    virtual = groups["virtual_pipeline_model_parallel_size"]
    for stage in range(virtual or 1):
        model = build(micro_config(**MODEL, **parallel), vp_stage=stage if virtual else None)
        names = global_names(model)
        for local, weight in named_weights(model).items():
            held[names[local].name] = (names[local].shard, weight.detach().clone())
    return held


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2_ep2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "pipeline_dtype": torch.float32,
    },
    "pp2_vpp2_etp2": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_dtype": torch.float32,
    },
    "ep4": {"expert_model_parallel_size": 4},
}


@functools.cache
def weights_of_one() -> dict[str, tuple[Shard, Tensor]]:
    return run_distributed(weights_of_rank, world_size=1, parallel={})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_start_from_the_same_weights(layout: str) -> None:
    one = weights_of_one()
    ranks = run_distributed(weights_of_rank, world_size=4, parallel=LAYOUTS[layout])
    assert set().union(*ranks) == set(one)
    for name, (_, expected) in one.items():
        held = [rank[name] for rank in ranks if name in rank]
        by_index = {shard.index: part for shard, part in held}
        for shard, part in held:  # replicas are equal, bit for bit
            assert torch.equal(part, by_index[shard.index]), name
        full = Shard.join([by_index[index] for index in sorted(by_index)], held[0][0])
        assert len(by_index) == held[0][0].count and torch.equal(full, expected), name


@pytest.mark.usefixtures("single_rank")
def test_megatrons_own_builder_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unpatched pretrain_gpt.py builds with Megatron's builder; the spec's hook fills in our values."""
    ours = micro_config(**MODEL, seed=77)
    config = GPTModelConfig(
        transformer=micro_config(**MODEL).transformer,
        transformer_layer_spec=dsv3,
        vocab_size=VOCAB_SIZE,
        seq_length=128,
        position_embedding_type="rope",
    )
    monkeypatch.setattr(megatron.training, "get_args", lambda: SimpleNamespace(seed=77))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (model,) = GPTModelBuilder(config).build_distributed_models(
        groups, wrap_with_ddp=False, mixed_precision_wrapper=None, data_parallel_random_init=False
    )
    expected = named_weights(build(ours))
    got = named_weights(model)
    assert got.keys() == expected.keys() and any(name.startswith("mtp.") for name in got)
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


@pytest.mark.usefixtures("single_rank")
def test_initialization_can_be_switched_off() -> None:
    config = micro_config(perform_initialization=False)
    build(config)
    assert config.transformer.perform_initialization is False
