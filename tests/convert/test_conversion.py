"""Names, bytes and failures of conversions, both ways."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_directory import HFDirectory
from dsv3_megatron.convert.to_hf import megatron_to_hf
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.convert.verify import verify
from tests.convert.releases import INDEX, micro, release, rewrite, tensors_of, to_fp8

COPY = "model.layers.3.embed_tokens.weight"
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert got.keys() == expected.keys()
    assert [n for n in expected if got[n].dtype != expected[n].dtype] == []
    assert [n for n in expected if not torch.equal(bits(got[n]), bits(expected[n]))] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_byte_identical(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = release(tmp_path / "hf", mtp=True, dtype=dtype)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", workers=2)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", shard_size=50_000, workers=2)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert_identical(tensors_of(tmp_path / "back"), expected)
    assert expected["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in expected.values())
    assert (tmp_path / "back" / "tokenizer_config.json").exists()
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    different = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert different <= {"dtype", "torch_dtype"}
    result = verify(tmp_path / "back", tmp_path / "megatron", logits=False)
    assert result == {"tensors": len(expected), "max_abs_diff": 0.0, "logits_max_abs_diff": None}


def test_transformers_loads_what_comes_out(whole: Path, converted: Path, tmp_path: Path) -> None:
    """From the files, with nothing missing or left over but the MTP layer, which transformers does not build."""
    megatron_to_hf(converted, tmp_path / "back", dtype="bf16")
    loaded, report = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in report["unexpected_keys"])
    original = DeepseekV3ForCausalLM.from_pretrained(whole, dtype=torch.float32).state_dict()
    for name, tensor in loaded.state_dict().items():
        keeps = name.endswith("e_score_correction_bias")
        assert torch.equal(tensor, original[name] if keeps else original[name].bfloat16().float()), name


@pytest.mark.parametrize("factor", [1.0, 1.3], ids=["amax_448", "other_scales"])
def test_fp8_round_trip_is_byte_identical(factor: float, tmp_path: Path) -> None:
    release(tmp_path / "hf", micro(hidden_size=192, kv_lora_rank=144), mtp=True, dtype=torch.bfloat16)
    to_fp8(tmp_path / "hf", factor)
    expected = tensors_of(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="fp8")
    assert_identical(tensors_of(tmp_path / "back"), expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_requantised_weights_are_within_the_documented_bound(tmp_path: Path) -> None:
    meant = release(tmp_path / "hf", micro(hidden_size=192), dtype=torch.bfloat16)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "fp8", dtype="fp8")
    stored = HFDirectory(tmp_path / "fp8")
    worst = 0.0
    for name, weight in meant.items():
        value = stored.tensor(name, torch.float32)
        if not stored.is_fp8(name):
            assert torch.equal(value, weight.float()), name
            continue
        scale = stored.stored(name + "_scale_inv").max()
        bound = torch.maximum(weight.float().abs() * 2**-4, scale * 2**-10) * (1 + 2**-20)
        error = (value - weight.float()).abs()
        assert bool((error <= bound).all()), name
        worst = max(worst, float(error.max()))
    assert worst > 1e-3  # FP8 it is


def test_dtype_is_kept_unless_asked(tmp_path: Path) -> None:
    stored = release(tmp_path / "hf", dtype=torch.bfloat16)
    hf_to_megatron(tmp_path / "hf", tmp_path / "fp32", dtype="fp32")
    megatron_to_hf(tmp_path / "fp32", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}
    assert all(torch.equal(back[name], stored[name].float()) for name in stored)
    megatron_to_hf(tmp_path / "fp32", tmp_path / "bf16", dtype="bf16")
    assert_identical(tensors_of(tmp_path / "bf16"), stored)


def edited(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = tensors_of(folder)
        change(tensors)
        rewrite(folder, tensors, num_shards=3)

    return damage


def truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"x" + file.read_bytes()[9:])


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def unlist(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EXPERT] = next(
        f for f in index["weight_map"].values() if f != index["weight_map"][EXPERT]
    )
    (folder / INDEX).write_text(json.dumps(index))


def change_config(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"model-00002-of-00003.safetensors: model.*: truncated file"),
    "corrupt": (corrupt, r"model-00002-of-00003.safetensors: corrupt header"),
    "missing shard": (remove_shard, r"model-00002-of-00003.safetensors: missing shard; .* has model"),
    "index": (unlist, rf"model-.*: {EXPERT} is "),
    "missing tensor": (edited(lambda t: t.pop(EXPERT)), rf"{EXPERT} is missing"),
    "left over": (edited(lambda t: t.update(extra=torch.ones(2))), r"model-.*: extra does not belong"),
    "one layer too many": (
        edited(lambda t: t.update({"model.layers.7.enorm.weight": torch.ones(32)})),
        r"model.layers.4.* is missing",
    ),
    "wrong shape": (
        edited(lambda t: t.update({EXPERT: t[EXPERT][:-1]})),
        rf"model-.*: {EXPERT}: shape \(19, 32\), but config.json describes \(20, 32\)",
    ),
    "copies differ": (
        edited(lambda t: t.update({COPY: t[COPY] + 1})),
        rf"model-.*: {COPY} differs from model.embed_tokens.weight",
    ),
    "no scale": (
        edited(lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)})),
        rf"{EXPERT}: FP8 without its scale",
    ),
    "scale of wrong shape": (
        edited(
            lambda t: t.update(
                {EXPERT: t[EXPERT].to(torch.float8_e4m3fn), f"{EXPERT}_scale_inv": torch.ones(2, 1)}
            )
        ),
        rf"{EXPERT}_scale_inv: torch.float32 \(2, 1\)",
    ),
    "another dtype": (
        edited(lambda t: t.update({EXPERT: t[EXPERT].to(torch.int32)})),
        rf"{EXPERT}: dtype I32 is not one of",
    ),
    "another model": (change_config(scoring_func="softmax"), r"scoring_func='softmax' is not DeepSeek-V3"),
    "another rope": (
        change_config(rope_scaling={"type": "linear", "factor": 2}, rope_parameters=None),
        "rope type 'linear'",
    ),
    "half a yarn": (
        change_config(rope_scaling={"type": "yarn", "factor": 40}, rope_parameters=None),
        r"yarn without \['original_max_position_embeddings'",
    ),
    "two ropes": (
        change_config(
            rope_scaling={"type": "yarn", "factor": 40},
            rope_parameters={"rope_type": "yarn", "factor": 20, "rope_theta": 10000},
        ),
        r"disagree on \['factor'\]",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "hf"
    release(folder, mtp=True)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_input_is_named_and_nothing_looks_complete(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ConversionError, match=message):
        hf_to_megatron(folder, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_both_spellings_of_rope_give_the_same_model(whole: Path, tmp_path: Path) -> None:
    yarn: dict[str, Any] = {
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    spellings: list[dict[str, Any]] = [
        {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": {"type": "yarn", **yarn}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **yarn}},
    ]
    found = []
    for number, spelling in enumerate(spellings):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        change_config(**spelling)(folder)
        found.append(HFDirectory(folder).architecture)
    assert found[0] == found[1]
    assert found[0].yarn is not None and found[0].yarn.factor == 40


@pytest.fixture(scope="module")
def converted(whole: Path) -> Path:
    hf_to_megatron(whole, whole.parent / "megatron")
    return whole.parent / "megatron"


def cut_file(folder: Path) -> None:
    file = folder / "release" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1000])


def flip_bytes(folder: Path) -> None:
    file = folder / "release" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[100:200] = bytes(100)
    file.write_bytes(bytes(content))


def remove_file(folder: Path) -> None:
    (folder / "release" / "__1_0.distcp").unlink()


@pytest.mark.parametrize(
    "change, message",
    [
        (cut_file, r"__1_0.distcp: truncated: "),
        (flip_bytes, r"__1_0.distcp: .* at byte "),
        (remove_file, r"__1_0.distcp: missing; .metadata has "),
    ],
)
def test_damaged_checkpoint_is_named(
    change: Callable[[Path], None], message: str, converted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "megatron"
    shutil.copytree(converted, folder)
    change(folder)
    with pytest.raises(ConversionError, match=message):
        megatron_to_hf(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_verify_sees_one_changed_element(whole: Path, converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    tensors = tensors_of(folder)
    tensors[EXPERT][3, 4] += 0.5
    rewrite(folder, tensors)
    assert verify(folder, converted, logits=False)["max_abs_diff"] == pytest.approx(0.5)
    change_config(num_experts_per_tok=2)(folder)
    with pytest.raises(ConversionError, match=r"moe_router_topk: 3 in Megatron, 2 in config\.json"):
        verify(folder, converted)
