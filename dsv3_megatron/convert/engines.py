"""Whether vLLM and SGLang could load a Hugging Face directory: every tensor has its place, every parameter its parts.

    python -m dsv3_megatron.convert engines --hf DIR

The engines themselves want a GPU; their published name maps are data here (`engines.toml`). What an engine expects is
made from config.json alone, what the directory has is put through the map, and the two are compared. Pure, but for
opening the directory.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from dsv3_megatron.convert.architecture import Architecture

__all__ = ["ENGINES", "Loading", "load", "maps"]

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|weight_scale_inv)")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def maps() -> dict[str, Any]:
    """The engines' maps by name."""
    return tomllib.loads(files("dsv3_megatron.convert").joinpath("engines.toml").read_text())


ENGINES = tuple(maps())

# A parameter of an engine (of its main or its drafting model), and a part of it: (model, parameter), part.
Place = tuple[tuple[str, str], str]


@dataclass(frozen=True)
class Loading:
    """What an engine would do with a directory.

    Attributes:
        consumed: tensors that go into a parameter.
        unread: tensors that the engine takes from elsewhere, by its own rule.
        left: tensors it has no place for.
        missing: parameters, or parts of them, that nothing fills.
    """

    engine: str
    consumed: int
    unread: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every tensor consumed, none left, every parameter filled."""
        return not self.left and not self.missing


def load(engine: str, names: Iterable[str], arch: Architecture, scaled: bool) -> Loading:
    """Put tensor names through an engine's map.

    Args:
        names: of the tensors in the directory's files.
        arch: of its config.json.
        scaled: whether weights are FP8 with `weight_scale_inv`; an engine then expects the scales too.
    """
    rules = maps()[engine]
    wanted = set(_expected(rules, arch, scaled))
    unread: list[str] = []
    left: list[str] = []
    filled: set[Place] = set()
    consumed = 0
    for name in names:
        place = _place(rules, name, arch)
        if place is None:
            unread.append(name)
        elif (
            place in wanted and place not in filled
        ):  # a place that is filled twice would hold the second alone
            filled.add(place)
            consumed += 1
        else:
            left.append(name)
    missing = sorted(f"{parameter} ({part})" for (_, parameter), part in wanted - filled)
    return Loading(engine, consumed, unread, left, missing)


def _place(rules: dict[str, Any], name: str, arch: Architecture) -> Place | None:
    """Where the engine puts a tensor; None where it does not read it."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return ("main", name), ""
    number, rest = int(match[1]), match[2]
    if number < arch.num_layers:
        return _in_layer(rules, "main", f"model.layers.{number}.", rest, arch)
    draft = rules["draft"]
    if rest in draft["unread"]:
        return None
    if rest in draft["moved"]:
        return ("draft", draft["moved"][rest]), ""
    if any(rest.startswith(own + ".") for own in draft["own"]):
        return ("draft", draft["own_at"].format(N=number) + rest), ""
    return _in_layer(rules, "draft", draft["block_at"].format(N=number), rest, arch)


def _in_layer(rules: dict[str, Any], model: str, prefix: str, rest: str, arch: Architecture) -> Place:
    expert = _EXPERT.fullmatch(rest)
    if expert:
        for stacked, parts in rules["experts"].items():
            if expert[2] in parts:
                return (
                    model,
                    f"{prefix}mlp.experts.{stacked}_{expert[3]}",
                ), f"expert {expert[1]} {expert[2]}"
    stem, _, kind = rest.rpartition(".")
    for fused, parts in rules["fused"].items():
        if stem in parts and (arch.q_lora_rank is not None or not stem.startswith("self_attn.")):
            return (model, f"{prefix}{fused}.{kind}"), stem
    return (model, prefix + rest), ""


def _expected(rules: dict[str, Any], arch: Architecture, scaled: bool) -> Iterator[Place]:
    """Every parameter of the engine's models with each of its parts, from the sizes."""
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        yield ("main", name), ""
    for number in range(arch.num_layers):
        yield from _layer_expected(
            rules, "main", f"model.layers.{number}.", arch, arch.is_moe(number), scaled
        )
    draft = rules["draft"]
    for number in range(arch.num_layers, arch.num_layers + arch.mtp_num_layers):
        for own in draft["own"]:
            yield ("draft", f"{draft['own_at'].format(N=number)}{own}.weight"), ""
        for place in draft["moved"].values():
            yield ("draft", place), ""
        moe = arch.is_moe(arch.num_layers - 1)
        yield from _layer_expected(rules, "draft", draft["block_at"].format(N=number), arch, moe, scaled)


def _layer_expected(
    rules: dict[str, Any], model: str, prefix: str, arch: Architecture, moe: bool, scaled: bool
) -> Iterator[Place]:
    kinds = ("weight", "weight_scale_inv") if scaled else ("weight",)
    norms = [*_NORMS, "self_attn.kv_a_layernorm"]
    linears = ["self_attn.kv_b_proj", "self_attn.o_proj", "self_attn.kv_a_proj_with_mqa"]
    if arch.q_lora_rank is None:
        linears.append("self_attn.q_proj")
    else:
        norms.append("self_attn.q_a_layernorm")
        linears += ["self_attn.q_a_proj", "self_attn.q_b_proj"]
    mlps = ["mlp"] if not moe else ["mlp.shared_experts"] if arch.num_shared_experts else []
    linears += [f"{mlp}.{part}" for mlp in mlps for part in ("gate_proj", "up_proj", "down_proj")]
    for norm in norms:
        yield (model, f"{prefix}{norm}.weight"), ""
    for kind in kinds:
        for linear in linears:
            yield _in_layer(rules, model, prefix, f"{linear}.{kind}", arch)
    if not moe:
        return
    yield (model, f"{prefix}mlp.gate.weight"), ""
    if arch.has_expert_bias:
        yield (model, f"{prefix}mlp.gate.e_score_correction_bias"), ""
    for expert in range(arch.num_experts):
        for part in ("gate_proj", "up_proj", "down_proj"):
            for kind in kinds:
                yield _in_layer(rules, model, prefix, f"mlp.experts.{expert}.{part}.{kind}", arch)
