"""Kimi K2, Moonlight, DeepSeek-V2-Lite: convert, verify, train, export; what Megatron's router has not is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_config import fields_from_hf
from dsv3_megatron.convert.hf_directory import HFDirectory
from dsv3_megatron.convert.logits import of_transformers
from dsv3_megatron.convert.to_hf import megatron_to_hf
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.convert.verify import verify
from tests.convert.releases import kimi_k2, micro, moonlight, named, release, tensors_of, to_fp8, v2_lite
from tests.convert.test_conversion import assert_identical
from tests.convert.test_parity import of_v3
from tests.convert.test_training import WINDOWS, Layout, evaluated, loss_of

FAMILY: dict[str, Callable[[], Any]] = {"kimi_k2": kimi_k2, "moonlight": moonlight, "v2_lite": v2_lite}


def make(name: str, folder: Path) -> dict[str, torch.Tensor]:
    tensors = release(folder, FAMILY[name](), dtype=torch.float32)
    if name == "kimi_k2":
        named(
            folder, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
        )
    return tensors


@pytest.fixture(scope="module", params=FAMILY)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param, folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder


def test_verify_finds_the_same_model(converted: Path) -> None:
    found = verify(converted / "hf", converted / "megatron")
    assert found["max_abs_diff"] == 0 and found["logits_max_abs_diff"] < 1e-5


def test_round_trip_is_byte_identical_and_keeps_its_name(converted: Path, tmp_path: Path) -> None:
    megatron_to_hf(converted / "megatron", tmp_path / "back")
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(converted / "hf"))
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (converted / "hf", tmp_path / "back")
    )
    assert {key for key in before | after if before.get(key) != after.get(key)} <= {"dtype", "torch_dtype"}
    # And from the training's arguments alone, under the name that transformers knows.
    arch = HFDirectory(converted / "hf").architecture
    again = arch.to_hf()
    assert Architecture.from_hf(again, 0) == arch
    assert again["model_type"] == ("deepseek_v2" if before["model_type"] == "deepseek_v2" else "deepseek_v3")


@pytest.mark.slow
def test_printed_arguments_train_it(converted: Path, tmp_path: Path) -> None:
    """The trainer's loss of the converted weights is transformers'; after steps and export, again."""
    tokens = [torch.from_numpy(WINDOWS.tokens)]
    start = evaluated(
        Layout("1f1b", world_size=1), converted / "megatron", "--train-iters", "1", "--skip-train"
    )
    before = loss_of(of_transformers(HFDirectory(converted / "hf"), tokens)[0])
    assert start == pytest.approx(before, abs=1e-5)
    save = ["--train-iters", "5", "--save", str(tmp_path / "trained"), "--save-interval", "5"]
    trained = evaluated(Layout("1f1b", ep=2), converted / "megatron", *save)
    megatron_to_hf(tmp_path / "trained", tmp_path / "back", hf_files=converted / "megatron" / "hf")
    assert loss_of(of_transformers(HFDirectory(tmp_path / "back"), tokens)[0]) == pytest.approx(
        trained, abs=1e-5
    )
    assert abs(trained - before) > 0.02


def test_moonlight_has_v3s_own_semantics(tmp_path: Path) -> None:
    """rms_norm_eps 1e-5, and 1e-6 in the latents, as the released code has it."""
    tensors = make("moonlight", tmp_path / "hf")
    tokens = torch.randint(96, (1, 64), generator=torch.Generator().manual_seed(3))
    theirs = of_transformers(HFDirectory(tmp_path / "hf"), [tokens])[0]
    assert float((theirs - of_v3(tmp_path / "hf", tensors, tokens)).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"topk_method": "group_limited_greedy"}, "group_limited_greedy.*scores a group by its best expert"),
        ({"norm_topk_prob": True}, "norm_topk_prob=True.*leaves out routed_scaling_factor"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not DeepSeek-V2-Lite"),
    ],
)
def test_other_gates_of_v2_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = json.loads(v2_lite().to_json_string())
    fields_from_hf(config)
    with pytest.raises(ConversionError, match=message):
        fields_from_hf(config | changes)


@pytest.mark.parametrize("name", ["v3", "v2_lite"])
def test_fused_experts_are_read(name: str, tmp_path: Path) -> None:
    """What transformers 5 writes when it keeps its own format: the same checkpoint as from separate experts."""
    config = v2_lite() if name == "v2_lite" else micro()
    release(tmp_path / "hf", config)
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).save_pretrained(
        tmp_path / "fused", save_original_format=False, max_shard_size="40KB"
    )
    names = tensors_of(tmp_path / "fused").keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert not any(".experts.0." in name for name in names)
    for side in ("hf", "fused"):
        hf_to_megatron(tmp_path / side, tmp_path / f"{side}_megatron")
        megatron_to_hf(tmp_path / f"{side}_megatron", tmp_path / f"{side}_back")
    assert_identical(tensors_of(tmp_path / "fused_back"), tensors_of(tmp_path / "hf"))
    found = verify(tmp_path / "fused", tmp_path / "hf_megatron")
    assert found["max_abs_diff"] == 0 and found["logits_max_abs_diff"] < 1e-5


def fuse(folder: Path) -> None:
    """The directory's experts in one tensor per layer and kind, scales too."""
    from tests.convert.releases import rewrite

    tensors = tensors_of(folder)
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        for suffix in (".weight", ".weight_scale_inv"):
            if f"{prefix}0.gate_proj{suffix}" not in tensors:
                continue
            count = len(
                [name for name in tensors if name.startswith(prefix) and name.endswith(f"gate_proj{suffix}")]
            )
            parts = {
                kind: [tensors.pop(f"{prefix}{e}.{kind}{suffix}") for e in range(count)]
                for kind in ("gate_proj", "up_proj", "down_proj")
            }
            both = [torch.cat(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
            tail = suffix.removeprefix(".weight")
            tensors[f"{prefix}gate_up_proj{tail}"] = torch.stack(both)
            tensors[f"{prefix}down_proj{tail}"] = torch.stack(parts["down_proj"])
    rewrite(folder, tensors, num_shards=2)


def test_fused_experts_in_fp8(tmp_path: Path) -> None:
    release(tmp_path / "hf", micro(hidden_size=192, moe_intermediate_size=128), dtype=torch.bfloat16)
    to_fp8(tmp_path / "hf")
    expected = tensors_of(tmp_path / "hf")
    fuse(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="fp8")
    assert_identical(tensors_of(tmp_path / "back"), expected)


def test_fused_experts_whose_scales_cross_are_refused(tmp_path: Path) -> None:
    release(tmp_path / "hf", micro(hidden_size=192, moe_intermediate_size=100), dtype=torch.bfloat16)
    to_fp8(tmp_path / "hf")
    fuse(tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"gate_up_proj: FP8 with 100 rows.*convert the files to bf16"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")


def powers_of_two(folder: Path) -> None:
    """Make an FP8 directory one of V3.1's: scales rounded up to powers of two, and scale_fmt."""
    from tests.convert.releases import rewrite

    tensors = tensors_of(folder)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight, scale = name.removesuffix("_scale_inv"), tensors[name]
        rounded = torch.exp2(torch.ceil(torch.log2(scale)))
        rows, columns = (torch.arange(size) // 128 for size in tensors[weight].shape)
        full = (scale / rounded)[rows][:, columns]
        tensors[weight] = (tensors[weight].float() * full).to(torch.float8_e4m3fn)
        tensors[name] = rounded
    rewrite(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    named(folder, quantization_config=config["quantization_config"] | {"scale_fmt": "ue8m0"})


@pytest.mark.parametrize("trained", [False, True], ids=["as it was", "trained"])
def test_ue8m0_survives(trained: bool, tmp_path: Path) -> None:
    """Unchanged weights are given back to the byte; changed ones get scales that are powers of two."""
    release(tmp_path / "hf", micro(hidden_size=192), dtype=torch.bfloat16)
    to_fp8(tmp_path / "hf")
    powers_of_two(tmp_path / "hf")
    source = tmp_path / "hf"
    if trained:
        source = tmp_path / "changed"
        release(source, micro(hidden_size=192), dtype=torch.bfloat16, seed=1)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="fp8", hf_files=tmp_path / "hf")
    after = tensors_of(tmp_path / "back")
    if not trained:
        assert_identical(after, tensors_of(tmp_path / "hf"))
    scales = torch.cat([value.flatten() for name, value in after.items() if name.endswith("_scale_inv")])
    assert torch.equal(torch.log2(scales), torch.log2(scales).round()) and len(scales.unique()) > 1
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    if trained:  # within the documented bound of what was to be stored
        stored, meant = HFDirectory(tmp_path / "back"), tensors_of(source)
        for name in stored.weights:
            if stored.is_fp8(name):
                scale = stored.stored(name + "_scale_inv").max()
                error = (stored.tensor(name, torch.float32) - meant[name].float()).abs()
                assert bool(
                    (error <= torch.maximum(meant[name].float().abs() * 2**-4, scale * 2**-10) * 1.001).all()
                )


def test_other_quantizations_are_refused(tmp_path: Path) -> None:
    release(tmp_path / "hf")
    for given, message in (
        ({"quant_method": "compressed-tensors"}, "quant_method='compressed-tensors'.*'fp8'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2'"),
        ({"quant_method": "fp8", "scale_fmt": "e8m0"}, "scale_fmt='e8m0'"),
        ({"quant_method": "fp8", "weight_block_size": [1, 128]}, r"weight_block_size=\[1, 128\]"),
    ):
        named(tmp_path / "hf", quantization_config=given)
        with pytest.raises(ConversionError, match=message):
            HFDirectory(tmp_path / "hf")
