"""The spec functions: which layers a stage gets, what is refused, what backends are taken."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import import_module

from dsv3_megatron.specs import dsv3, mtp_spec
from dsv3_megatron.specs.layers import moe_layer_pattern
from dsv3_megatron.specs.select import select_backend
from tests.harness import run_distributed
from tests.specs.models import build, micro_config


def test_megatron_finds_the_two_word_spec() -> None:
    assert import_module(("dsv3_megatron.specs", "dsv3")) is dsv3


@pytest.mark.parametrize(
    "freq, expected",
    [(1, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), ([0, 0, 0, 1], [0, 0, 0, 1])],
)
def test_pattern(freq: Any, expected: list[int]) -> None:
    config = micro_config(num_layers=4, moe_layer_freq=freq).transformer
    assert moe_layer_pattern(config) == [bool(x) for x in expected]


def test_pattern_of_wrong_length_is_an_error() -> None:
    config = micro_config(num_layers=2, moe_layer_freq=[0, 1]).transformer
    config.moe_layer_freq = [0, 1, 1]
    with pytest.raises(ValueError, match="--moe-layer-freq has 3 entries, --num-layers is 2"):
        moe_layer_pattern(config)


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("qk_layernorm", False, "--qk-layernorm"),
        ("normalization", "LayerNorm", "--normalization RMSNorm"),
        ("add_bias_linear", True, "--disable-bias-linear"),
        ("gated_linear_unit", False, "--swiglu"),
        ("tensor_model_parallel_size", 2, "--tensor-model-parallel-size 2 needs --sequence-parallel"),
    ],
)
def test_contradicting_configurations_are_refused(setting: str, value: Any, message: str) -> None:
    config = micro_config()
    setattr(config.transformer, setting, value)
    with pytest.raises(ValueError, match=message):
        dsv3(config)


def test_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="--transformer-impl inference_optimized"):
        select_backend(SimpleNamespace(transformer_impl="inference_optimized", fp8_recipe=None))


def kind(mlp: object) -> str:
    return "moe" if isinstance(mlp, MoELayer) else "dense" if isinstance(mlp, MLP) else type(mlp).__name__


def kinds_of_layers(rank: int, world_size: int, layout: str | None, vpp: int | None) -> list[list[str]]:
    """Per chunk of this rank: "<global layer number> <kind>" for each layer, and what else the chunk has."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=world_size, virtual_pipeline_model_parallel_size=vpp
    )
    model_parallel_cuda_manual_seed(1)
    config = micro_config(
        num_layers=6,
        moe_layer_freq=[0, 0, 0, 1, 1, 1],
        mtp_num_layers=1,
        pipeline_model_parallel_size=world_size,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_model_parallel_layout=layout,
        pipeline_dtype=torch.float32,
    )
    chunks = []
    for stage in range(vpp or 1):
        model = build(config, vp_stage=stage if vpp else None)
        found = [f"{layer.layer_number} {kind(layer.mlp)}" for layer in model.decoder.layers]
        if hasattr(model, "mtp"):
            found.append(f"mtp {kind(model.mtp.layers[0].mtp_model_layer.mlp)}")
        found += [name for name in ("embedding", "output_layer") if hasattr(model, name)]
        chunks.append(found)
    return chunks


def test_kind_follows_the_layer_number_over_stages() -> None:
    assert run_distributed(kinds_of_layers, world_size=2, layout=None, vpp=None) == [
        [["1 dense", "2 dense", "3 dense", "embedding"]],
        [["4 moe", "5 moe", "6 moe", "mtp moe", "embedding", "output_layer"]],
    ]


def test_kind_follows_the_layer_number_over_virtual_stages_of_uneven_size() -> None:
    assert run_distributed(kinds_of_layers, world_size=2, layout="Et|tt|tt|tmL", vpp=2) == [
        [["1 dense", "embedding"], ["4 moe", "5 moe"]],
        [["2 dense", "3 dense"], ["6 moe", "mtp moe", "embedding", "output_layer"]],
    ]


@pytest.mark.usefixtures("single_rank")
def test_no_mtp_no_spec() -> None:
    assert mtp_spec(micro_config()) is None
    assert mtp_spec(micro_config(mtp_num_layers=1)) is not None
