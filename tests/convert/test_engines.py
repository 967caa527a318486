"""Names of converted models against what vLLM and SGLang expect, and the ways in which that must fail."""

import json
from dataclasses import replace

import pytest

from dsv3_megatron.convert.__main__ import main
from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.engines import ENGINES, load
from dsv3_megatron.convert.hf_directory import SCALE
from dsv3_megatron.convert.inventory import duplicates, is_quantized, weights
from dsv3_megatron.convert.to_hf import megatron_to_hf
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from tests.convert.releases import micro, release, tensors_of


def names_of_v3(layers: int = 6, experts: int = 16, scaled: bool = True) -> tuple[list[str], Architecture]:
    """All tensors of a release like the 671B one, by our own inventory: MTP with its copies, FP8's scales."""
    config = json.loads(micro().to_json_string()) | {
        "num_hidden_layers": layers, "first_k_dense_replace": 3, "n_routed_experts": experts, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8,
    }  # fmt: skip
    arch = Architecture.from_hf(config, mtp_num_layers=1)
    names = [weight.name for weight in weights(arch)]
    scales = [name + SCALE for name in names if is_quantized(name)] if scaled else []
    return [*names, *duplicates(arch), *scales], arch


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("layers", "experts"), [(6, 16), pytest.param(61, 256, marks=pytest.mark.slow)])
def test_every_tensor_of_v3_is_consumed(engine, layers, experts, scaled):
    names, arch = names_of_v3(layers, experts, scaled)
    found = load(engine, names, arch, scaled)
    assert found.complete, (found.left[:3], found.missing[:3])
    assert found.consumed + len(found.unread) == len(names) == len(set(names))
    unread = {"vllm": [], "sglang": ["embed_tokens.weight", "shared_head.head.weight"]}[engine]
    assert sorted(found.unread) == [f"model.layers.{layers}.{name}" for name in unread]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_wrong_is_seen(engine):
    """The control: a tensor less, one more, one misnamed, one layer too many, scales without weights' dtype."""
    names, arch = names_of_v3()
    less = [name for name in names if name != "model.layers.5.mlp.experts.7.up_proj.weight"]
    assert load(engine, less, arch, True).missing == [
        "model.layers.5.mlp.experts.w13_weight (expert 7 up_proj)"
    ]
    assert load(engine, [*names, "model.layers.0.self_attn.rope"], arch, True).left == [
        "model.layers.0.self_attn.rope"
    ]
    renamed = [name.replace("e_score_correction_bias", "expert_bias") for name in names]
    found = load(engine, renamed, arch, True)
    assert len(found.left) == len(found.missing) == 4 and not found.complete
    assert not load(engine, names, replace(arch, num_layers=5), True).complete
    assert not load(engine, names, arch, scaled=False).complete
    together = [*names, "model.layers.5.mlp.experts.gate_up_proj"]  # as transformers may save them
    assert load(engine, together, arch, True).left == together[-1:]
    megatron = [name.replace("mlp.gate_proj", "mlp.linear_fc1") for name in names]
    assert not load(engine, megatron, arch, True).complete


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    release(folder / "hf", mtp=True)
    hf_to_megatron(folder / "hf", folder / "megatron")
    for dtype in ("keep", "fp8"):
        megatron_to_hf(folder / "megatron", folder / dtype, dtype=dtype)
    return folder


@pytest.mark.parametrize("dtype", ["keep", "fp8"])
def test_what_megatron_to_hf_writes_is_consumed(converted, dtype, capsys):
    main(["engines", "--hf", str(converted / dtype)])
    lines = capsys.readouterr().out.splitlines()
    total = len(tensors_of(converted / dtype))
    assert lines == [
        f"vllm: {total} tensors consumed, 0 taken from elsewhere, none left",
        f"sglang: {total - 2} tensors consumed, 2 taken from elsewhere, none left",
    ]
