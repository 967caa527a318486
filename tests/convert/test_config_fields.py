"""Every field of config.json reaches both models of `verify`, is refused by name, or is listed as without effect."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_config import FAMILIES, INERT, fields_from_hf
from dsv3_megatron.convert.hf_directory import HFDirectory
from dsv3_megatron.convert.logits import of_megatron, of_transformers
from dsv3_megatron.convert.to_hf import megatron_to_hf
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.convert.verify import verify
from tests.convert.releases import YARN, micro, release

BOUND = 1e-5  # absolute, of fp32 logits whose standard deviation is about 1
TOKENS = torch.randint(96, (1, 64), generator=torch.Generator().manual_seed(3))
MSCALES = YARN | {"mscale": 0.707, "mscale_all_dim": 0.4}


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {name: v for name, v in (MSCALES | changes).items() if v is not None}}


LONGER = yarn(
    original_max_position_embeddings=4096
)  # where the two betas are not at the edge of 8 dimensions
LONGER_FAST = yarn(original_max_position_embeddings=4096, beta_fast=4)
LONGER_SLOW = yarn(original_max_position_embeddings=4096, beta_slow=0.2)
# Field → (what the model has before, what is changed). Fields that shape tensors come with other weights.
PLAIN: dict[str, Any] = {}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope_theta": (PLAIN, {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}),
    "rms_norm_eps": (PLAIN, {"rms_norm_eps": 1e-2}),
    "rms_norm_eps of Moonlight": (PLAIN, {"rms_norm_eps": 1e-5}),
    "routed_scaling_factor": (PLAIN, {"routed_scaling_factor": 1.25}),
    "n_group": (PLAIN, {"n_group": 2}),
    "n_group 1": ({"n_group": 2, "topk_group": 1}, {"n_group": 1, "topk_group": 1}),
    "topk_group": (PLAIN, {"topk_group": 3}),
    "num_experts_per_tok": (PLAIN, {"num_experts_per_tok": 2}),
    "rope_scaling": (PLAIN, {"rope_parameters": YARN}),
    "rope_scaling.factor": (yarn(), yarn(factor=20.0)),
    "rope_scaling.original_max_position_embeddings": (yarn(), yarn(original_max_position_embeddings=64)),
    "rope_scaling.beta_fast": (LONGER, LONGER_FAST),
    "rope_scaling.beta_slow": (LONGER, LONGER_SLOW),
    "rope_scaling.mscale": (yarn(), yarn(mscale=1.5)),
    "rope_scaling.mscale_all_dim": (yarn(), yarn(mscale_all_dim=1.0)),
    "rope_scaling without mscales": (yarn(), yarn(mscale=None, mscale_all_dim=None)),
    "rope_scaling.attention_factor": (yarn(), yarn(attention_factor=1.3)),
    "rope_scaling.attention_factor alone": (
        yarn(),
        yarn(attention_factor=0.7, mscale=None, mscale_all_dim=None),
    ),
    "rope_scaling.attention_factor 1": (yarn(), yarn(attention_factor=1.0)),
    "rope_scaling.rope_theta": (yarn(), yarn(rope_theta=50000.0)),
    "hidden_size": (PLAIN, {"hidden_size": 40}),
    "intermediate_size": (PLAIN, {"intermediate_size": 56}),
    "moe_intermediate_size": (PLAIN, {"moe_intermediate_size": 24}),
    "num_hidden_layers": (PLAIN, {"num_hidden_layers": 2}),
    "first_k_dense_replace": (PLAIN, {"first_k_dense_replace": 2}),
    "num_attention_heads": (PLAIN, {"num_attention_heads": 2, "num_key_value_heads": 2}),
    "n_shared_experts": (PLAIN, {"n_shared_experts": 2}),
    "n_routed_experts": (PLAIN, {"n_routed_experts": 12}),
    "kv_lora_rank": (PLAIN, {"kv_lora_rank": 12}),
    "q_lora_rank": (PLAIN, {"q_lora_rank": 16}),
    "q_lora_rank null": (PLAIN, {"q_lora_rank": None}),
    "qk_rope_head_dim": (PLAIN, {"qk_rope_head_dim": 16}),
    "qk_nope_head_dim": (PLAIN, {"qk_nope_head_dim": 12}),
    "v_head_dim": (PLAIN, {"v_head_dim": 16}),
    "vocab_size": (PLAIN, {"vocab_size": 104}),
}
SHAPES = frozenset(CHANGES) & {
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "first_k_dense_replace",
    "num_attention_heads", "n_shared_experts", "n_routed_experts", "kv_lora_rank", "q_lora_rank", "q_lora_rank null",
    "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "vocab_size",
}  # fmt: skip
NO_LOGITS = {"max_position_embeddings"}  # read, and recorded: how long a sequence may be


def both_logits(folder: Path, target: Path) -> tuple[Tensor, Tensor]:
    """(transformers', ours) after conversion and `verify`, which must find the same."""
    arch = hf_to_megatron(folder, target)
    found = verify(folder, target)
    assert found["max_abs_diff"] == 0 and found["logits_max_abs_diff"] < BOUND
    theirs = of_transformers(HFDirectory(folder), [TOKENS])[0]
    return theirs, of_megatron(arch, target / "release", [TOKENS])[0]


@pytest.fixture(scope="module")
def before_logits(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[dict[str, Any]], tuple[Tensor, Tensor]]:
    """Both sides' logits of a model before its change; each model once."""
    known: dict[str, tuple[Tensor, Tensor]] = {}

    def logits(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
        key = json.dumps(settings)
        if key not in known:
            folder = tmp_path_factory.mktemp("before")
            release(folder / "hf", micro(**settings))
            known[key] = both_logits(folder / "hf", folder / "megatron")
        return known[key]

    return logits


# Whether a field reaches the models is seen in the default run where a default of Megatron or a reader's own way may
# stand in its place; the others, and sizes, which tensors would contradict, are long.
QUICK = {
    "rope_theta", "rms_norm_eps of Moonlight", "routed_scaling_factor", "n_group 1", "topk_group",
    "rope_scaling.factor", "rope_scaling.mscale", "rope_scaling without mscales", "rope_scaling.attention_factor",
    "q_lora_rank null",
}  # fmt: skip


@pytest.mark.parametrize(
    "field", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in CHANGES]
)
def test_field_moves_the_logits_of_both_sides_alike(field: str, before_logits: Any, tmp_path: Path) -> None:
    before, change = CHANGES[field]
    release(tmp_path / "changed", micro(**before | change))
    after = both_logits(tmp_path / "changed", tmp_path / "megatron")
    assert after[0].std() > 0.3
    if field not in SHAPES:  # there, which weights there are says that it is read
        least = 3 * BOUND if "Moonlight" in field else 1e-3
        for side, moved in zip(before_logits(before), after, strict=True):
            assert float((side - moved).abs().max()) > least


@pytest.mark.parametrize("field", CHANGES)
def test_field_is_in_what_a_conversion_records_and_gives_back(field: str) -> None:
    """Recorded arguments, and a config.json made of them alone, describe the same model."""
    before, change = CHANGES[field]
    config, plain = (json.loads(micro(**c).to_json_string()) for c in (before | change, before))
    arch = Architecture.from_hf(config, 1)
    assert arch != Architecture.from_hf(plain, 1)
    assert Architecture.from_megatron(arch.namespace(), arch.vocab_size, 1) == arch
    again = Architecture.from_hf(json.loads(json.dumps(arch.to_hf())), 1)
    assert again == arch
    of_transformers_5 = DeepseekV3Config(**arch.to_hf()).to_dict()
    assert Architecture.from_hf(json.loads(json.dumps(of_transformers_5)), 1) == arch


def released_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` in the place of transformers 5's `rope_parameters`."""
    rope = dict(config.pop("rope_parameters"))
    scaling = {"type": rope.pop("rope_type"), **{k: v for k, v in rope.items() if k != "rope_theta"}}
    return config | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling["type"] == "default" else scaling,
    }


@pytest.mark.parametrize("field", [name for name in CHANGES if name.startswith("rope")])
def test_released_spelling_of_rope_is_the_same_model(field: str, tmp_path: Path) -> None:
    before, change = CHANGES[field]
    config = json.loads(micro(**before | change).to_json_string())
    spelled = released_spelling(dict(config))
    assert Architecture.from_hf(spelled, 0) == Architecture.from_hf(config, 0)
    if field != "rope_scaling":
        return
    release(tmp_path / "hf", micro(**before | change))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(spelled))
    both_logits(tmp_path / "hf", tmp_path / "megatron")


def test_a_wrong_rope_base_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `verify` did: Megatron's model configuration wrote its own default over the transformer's."""
    from dsv3_megatron.convert import logits

    release(tmp_path / "hf", micro(**CHANGES["rope_theta"][1]))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    fields = logits.transformer_fields
    monkeypatch.setattr(logits, "transformer_fields", lambda arch: fields(arch) | {"rotary_base": 10000})
    with pytest.raises(ConversionError, match=r"other values than \{'rotary_base': 50000\}"):
        verify(tmp_path / "hf", tmp_path / "megatron")
    monkeypatch.setattr(logits, "check_kept", lambda fields, config: setattr(config, "rotary_base", 10000))
    assert verify(tmp_path / "hf", tmp_path / "megatron")["logits_max_abs_diff"] > 0.01


# Keys of the released config.json of DeepSeek-V3 and of Kimi K2.
RELEASED_KEYS = {
    name
    for line in (
        "architectures attention_bias attention_dropout auto_map aux_loss_alpha bos_token_id eos_token_id ep_size",
        "first_k_dense_replace hidden_act hidden_size initializer_range intermediate_size kv_lora_rank",
        "max_position_embeddings model_type moe_intermediate_size moe_layer_freq n_group n_routed_experts",
        "n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers",
        "num_key_value_heads num_nextn_predict_layers pretraining_tp q_lora_rank qk_nope_head_dim qk_rope_head_dim",
        "quantization_config rms_norm_eps rope_scaling rope_theta routed_scaling_factor scoring_func seq_aux",
        "tie_word_embeddings topk_group topk_method torch_dtype transformers_version use_cache v_head_dim vocab_size",
    )
    for name in line.split()
}


def test_every_key_has_a_fate() -> None:
    """Keys of the releases and of transformers' class: changed above, of one possible value, or without effect."""
    moved = {name.split()[0].split(".")[0] for name in CHANGES} | {"rope_parameters"}
    fixed = set(FAMILIES["deepseek_v3"].fixed) | {
        "model_type",
        "num_key_value_heads",
        "head_dim",
        "qk_head_dim",
    }
    known = moved | fixed | INERT | NO_LOGITS
    assert RELEASED_KEYS - known == set()
    assert json.loads(DeepseekV3Config().to_json_string(use_diff=False)).keys() - known == set()
    assert not moved & INERT and not fixed & INERT


REFUSED: dict[str, Any] = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": True,
    "moe_layer_freq": 2,
    "rope_interleave": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "num_key_value_heads": 2,
    "model_type": "deepseek_v32",
    "index_topk": 2048,
    "sliding_window": 128,
    "my_new_field": 0,
    "rope_theta": 10000.5,
    "num_hidden_layers": "61",
    "n_routed_experts": 7,
    "topk_group": 9,
    "num_local_experts": 9,
    "rms_norm_eps": 0,
    "qk_rope_head_dim": 7,
    "head_dim": 192,
    "qk_head_dim": 8,
}


@pytest.mark.parametrize("key", REFUSED)
def test_another_value_is_refused_by_name(key: str) -> None:
    config = released_spelling(json.loads(micro().to_json_string()))
    fields_from_hf(config)
    with pytest.raises(ConversionError) as error:
        fields_from_hf(config | {key: REFUSED[key]})
    assert key in str(error.value).replace(
        "n_routed_experts", key if key == "num_local_experts" else "n_routed_experts"
    )
    assert "\n" not in str(error.value)


ANYTHING: list[Any] = [
    None,
    5,
    0,
    -1,
    0.5,
    math.nan,
    math.inf,
    True,
    "",
    "x",
    "1",
    [],
    {},
    [5],
    {"a": 1},
    [[1]],
]


@pytest.mark.parametrize("spelling", [dict, released_spelling])
def test_anything_in_any_place_is_read_or_named(spelling: Callable[[Any], Any]) -> None:
    """No other exception, and no model that cannot be written again."""
    config = spelling(json.loads(micro(**yarn()).to_json_string()))
    refused = 0
    for key, value in config.items():
        changed = [{k: v for k, v in config.items() if k != key}, *(config | {key: new} for new in ANYTHING)]
        if isinstance(value, dict):
            changed += [config | {key: value | {inner: new}} for inner in value for new in ANYTHING]
        for given in changed:
            try:
                arch = Architecture.from_hf(given, 0)
                assert Architecture.from_hf(arch.to_hf(), 0) == arch
            except ConversionError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 300


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"type": "dynamic", "factor": 2}, "rope type 'dynamic'"),
        (YARN | {"truncate": False}, "truncate must be True"),
        (YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        (
            YARN | {"mscale": 0.5, "mscale_all_dim": None},
            "mscale=0.5 and mscale_all_dim=None .* attention_factor",
        ),
        (YARN | {"mscale": 0, "mscale_all_dim": 1}, "mscale=0 and mscale_all_dim=1"),
        (YARN | {"factor": None}, r"yarn without \['factor'\]"),
        (YARN | {"original_max_position_embeddings": None}, "yarn without"),
        (YARN | {"factor": 1.0, "attention_factor": 2.0}, "attention_factor=2.0 with factor=1.0"),
        (YARN | {"short_factor": [1.0]}, r"\['short_factor'\]"),
        (YARN | {"beta_fast": "32"}, "beta_fast='32': a number"),
        ({"rope_type": "default", "factor": 4.0}, r"type 'default' with \['factor'\]"),
        (YARN | {"rope_theta": 20000.0}, r"disagree on \['rope_theta'\]"),
    ],
)
def test_another_rope_is_refused_by_name(rope: dict[str, Any], message: str) -> None:
    config = released_spelling(json.loads(micro().to_json_string())) | {"rope_scaling": rope}
    with pytest.raises(ConversionError, match=message):
        fields_from_hf(config)


def test_inert_fields_are_inert(tmp_path: Path) -> None:
    """Whatever they say, both sides give the same logits."""
    release(tmp_path / "hf", micro())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = both_logits(tmp_path / "hf", tmp_path / "megatron")
    shutil.copytree(tmp_path / "hf", tmp_path / "odd")
    odd = {
        "attention_dropout": 0.5, "aux_loss_alpha": 3.0, "seq_aux": False, "ep_size": 8, "pretraining_tp": 4,
        "initializer_range": 7.0, "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8, "use_cache": False,
        "num_nextn_predict_layers": 9, "_name_or_path": "somewhere", "prefix": "x",
        "torch_dtype": "float16", "transformers_version": "1.0", "output_router_logits": True, "unknown_but_null": None,
    }  # fmt: skip
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | odd))
    for got, wanted in zip(both_logits(tmp_path / "odd", tmp_path / "odd_megatron"), expected, strict=True):
        assert torch.equal(got, wanted)


def test_attention_factor_survives_a_round_trip_without_the_kept_config(tmp_path: Path) -> None:
    """config.json made from the training's arguments alone: transformers has the same logits."""
    release(tmp_path / "hf", micro(**yarn(attention_factor=1.3)))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / "hf")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    before, after = (of_transformers(HFDirectory(tmp_path / name), [TOKENS])[0] for name in ("hf", "back"))
    assert float((before - after).abs().max()) < BOUND
