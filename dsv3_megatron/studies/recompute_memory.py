"""What recomputing norms and MLA's up-projections saves (report §3.2.3), in bytes per token of one layer.

    python -m dsv3_megatron.studies.recompute_memory [model=v3_671b] [output=json|table]

A dense layer of the model is built on the CPU and run forward; what autograd keeps is counted at the end of the pass,
each storage once, weights left out: what recomputation has given up by then counts nothing. MoE layers have the same
norms and the same attention. Norms and attention are stand-ins that keep what fused GPU kernels keep (a norm its input
and a number per token; attention query, key, value, output and a number per head and token), in bf16.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dsv3_megatron.conf import ConfigError, compose
from dsv3_megatron.errors import exits_cleanly

TOKENS = 64
# One dense layer is run; what else the model needs is small.
SMALL = (
    *(
        "layout=cpu_single",
        "precision=bf16",
        "num_layers=2",
        "moe_layer_freq='[0]*1+[1]*1'",
        "mtp_num_layers=0",
    ),
    *("num_experts=8", "moe_router_num_groups=4", "moe_router_group_topk=2", "moe_router_topk=2"),
    *(
        "moe_ffn_hidden_size=64",
        "moe_shared_expert_intermediate_size=64",
        "vocab_size=1024",
        "padded_vocab_size=1024",
    ),
)
# Name of a row to the modules that are recomputed.
CASES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "norms": ("layernorm",),
    "MLA up-projections": ("mla_up_proj",),
    "both (the presets)": ("layernorm", "mla_up_proj"),
}


@exits_cleanly
def main(words: Sequence[str] | None = None) -> None:
    """Measure every case and print."""
    words = list(sys.argv[1:] if words is None else words)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    outputs = [word.partition("=")[2] for word in words if word.startswith("output=")]
    if outputs and outputs[-1] not in ("json", "table"):
        raise ConfigError(f"output={outputs[-1]}: use output=json or output=table")
    overrides = [word for word in words if not word.startswith("output=")]
    rows = measure(overrides)
    print(json.dumps({"layer": rows}) if outputs[-1:] == ["json"] else table(rows))


def measure(overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Per case: `recompute`, `bytes_per_token` that autograd keeps of a layer, `saved_per_token` against nothing."""
    kept = {name: kept_bytes(overrides, modules) / TOKENS for name, modules in CASES.items()}
    return [
        {"recompute": name, "bytes_per_token": count, "saved_per_token": kept["nothing"] - count}
        for name, count in kept.items()
    ]


def kept_bytes(overrides: Sequence[str], recompute: Sequence[str]) -> int:
    """Bytes that autograd keeps of a dense layer's forward pass of TOKENS tokens."""
    from dsv3_megatron import cpu

    cpu.activate()
    from dsv3_megatron.dryrun.world import FakeWorld

    modules = f"[{','.join(recompute)}]" if recompute else "null"
    granularity = "selective" if recompute else "null"
    model = [] if any(word.startswith("model=") for word in overrides) else ["model=v3_671b"]
    choice = [f"recompute_modules={modules}", f"recompute_granularity={granularity}"]
    with FakeWorld.of(compose([*model, *SMALL, *overrides, *choice]), rank=0) as world:
        return _run(_build(world))


def _build(world: Any) -> Any:
    """The dense layer, with weights that nobody has set: what is kept does not depend on them."""
    from dsv3_megatron.specs.builder import DSV3ModelBuilder

    config = world.model_config.transformer
    config.init_model_with_meta_device = config.perform_initialization = False
    return DSV3ModelBuilder(world.model_config).build_model(world.groups).decoder.layers[0].train()


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError("measured in the forward pass only")


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(v)
        ctx.save_for_backward(q, k, v, output, torch.zeros(q.shape[:-1]))
        return output.flatten(2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError("measured in the forward pass only")


def _norm(weight: torch.Tensor, x: torch.Tensor) -> Any:
    return _FusedNorm.apply(x, weight)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *unused: Any, **named: Any) -> Any:
    return _FusedAttention.apply(q, k, v)


def _use_stand_ins(layer: Any) -> None:
    from dsv3_megatron.backends.attention import SDPACoreAttention
    from dsv3_megatron.backends.norm import RMSNorm

    for module in layer.modules():
        if isinstance(module, RMSNorm):
            setattr(module, "forward", partial(_norm, module.weight))  # noqa: B010
        elif isinstance(module, SDPACoreAttention):
            setattr(module, "forward", _attention)  # noqa: B010


def _run(layer: Any) -> int:
    _use_stand_ins(layer)
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    hidden = torch.zeros(TOKENS, 1, layer.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = layer(hidden, attention_mask=None)
    assert output.shape == hidden.shape
    # Given-up storages have no bytes any more.
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in kept) if s.nbytes()}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| recomputed | kept, bytes per token and layer | saved |", "|---|---|---|"]
    for row in rows:
        share = row["saved_per_token"] / (row["bytes_per_token"] + row["saved_per_token"])
        lines.append(
            f"| {row['recompute']} | {row['bytes_per_token']:,.0f} | {row['saved_per_token']:,.0f} ({share:.1%}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
