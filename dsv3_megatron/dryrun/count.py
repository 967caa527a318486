"""What the modules of a rank weigh, parameter by parameter."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

_LAYER = re.compile(r"^(?:decoder|mtp)\.layers\.(\d+)\.")
# Module kind by global name, first match wins.
_KINDS = (
    ("embedding", re.compile(r"^embedding\.")),
    ("output_head", re.compile(r"^output_layer\.")),
    ("norm", re.compile(r"(norm|layernorm)\.weight$")),
    ("attention", re.compile(r"\.self_attention\.")),
    ("routed_experts", re.compile(r"\.mlp\.experts\.")),
    ("shared_experts", re.compile(r"\.mlp\.shared_experts\.")),
    ("router", re.compile(r"\.mlp\.router\.")),
    ("dense_mlp", re.compile(r"\.mlp\.linear_fc")),
    ("mtp_projection", re.compile(r"^mtp\..*eh_proj\.")),
)


@dataclass(frozen=True)
class Weight:
    """One parameter of one rank.

    Attributes:
        name: global name, the same in every layout (`dsv3_megatron.specs.names`).
        shape: what this rank holds.
        full_shape: over all tensor-parallel ranks.
        kind: module kind: embedding, output_head, norm, attention, routed_experts, shared_experts, router,
            dense_mlp or mtp_projection.
        layer: number of the decoder layer from 0, or of the MTP layer from 0 when `mtp`; None outside layers.
        mtp: belongs to multi-token prediction alone.
        copies: how many of its like there are beside it, one on each expert-parallel rank; 1 for what is no
            expert. Where experts have copies in slots: different experts of the layer by slots of a rank.
    """

    name: str
    shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    kind: str
    layer: int | None
    mtp: bool
    copies: int | Fraction

    @property
    def local_size(self) -> int:
        """Elements this rank holds."""
        return prod(self.shape)

    @property
    def full_size(self) -> int:
        """Elements of the whole tensor, and of its like on the other expert-parallel ranks."""
        return prod(self.full_shape) * self.copies  # type: ignore[return-value]


def kind_of(name: str) -> str:
    """Module kind of a global name; KeyError for a name of no known kind, so that nothing goes uncounted."""
    for kind, pattern in _KINDS:
        if pattern.search(name):
            return kind
    raise KeyError(f"parameter {name!r} is of no known kind")


def weights_of(chunk: Any) -> list[Weight]:
    """The parameters of a model chunk; the routers' expert_bias is a buffer and none of them.

    Parameters with `requires_grad` off count like any other.
    """
    from megatron.core.utils import get_pg_size

    from dsv3_megatron.specs.names import global_names

    names = global_names(chunk)
    weights = []
    for local, parameter in chunk.named_parameters():
        name, shard = names[local].name, names[local].shard
        copies: int | Fraction = 1
        if ".experts." in local:
            moe = chunk.get_submodule(local[: local.index(".experts.")])
            copies = get_pg_size(chunk.pg_collection.ep)
            if hasattr(moe, "slots"):  # two of them may hold the same expert, and one the shared expert
                name = f"{name[: name.index('.mlp.')]}{local[local.index('.mlp.experts.') :]}"
                copies = Fraction(moe.slots.num_choices, moe.num_local_experts)
        kind, layer = kind_of(name), _LAYER.match(name)
        weights.append(
            Weight(
                name=name,
                shape=tuple(parameter.shape),
                full_shape=shard.full_shape(parameter.shape),
                kind=kind,
                layer=int(layer[1]) if layer else None,
                mtp=name.startswith("mtp."),
                copies=copies,
            )
        )
    return weights


def total(weights: Iterable[Weight], mtp: bool = True) -> int:
    """Elements of the whole model, from the parameters of all pipeline stages.

    A tensor that stands on several stages (MTP's copy of the embedding) counts once. mtp: count MTP's own
    parameters.
    """
    unique = {weight.name: weight.full_size for weight in weights if mtp or not weight.mtp}
    return int(sum(unique.values()))
