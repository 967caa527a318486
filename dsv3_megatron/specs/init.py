"""Initial weights that depend only on the seed and on a parameter's global name.

Megatron's own depend on the pipeline rank and on the order of construction. Here every parameter has its own
random generator, seeded by a stable hash of (seed, global name): the same model starts from the same weights
in any layout, under any schedule, in either backend, and copies of a parameter on several ranks start equal.
"""

import hashlib
import math

import torch
from torch import Tensor

from dsv3_megatron.specs.names import global_names, named_weights, unwrap

__all__ = ["generator", "initial_weight", "initialize"]


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded with the first 8 bytes of blake2b("seed:name")."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little", signed=True))


def initial_weight(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """The full tensor of one parameter before training, fp32 on CPU.

    Norm weights are 1, the router's expert_bias is 0, everything else is normal with mean 0. DeepSeek-V3 uses
    one standard deviation, 0.006, for all of them (report §4.2), output projections and embedding included;
    Megatron would divide that of output projections by √(2·layers).

    Args:
        name: global name, see `dsv3_megatron.specs.names`.
        shape: shape of the full tensor, over all tensor-parallel ranks.
        std: `--init-method-std`.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("expert_bias"):
        return torch.zeros(shape)
    numel = math.prod(shape)
    # torch draws in blocks of 16; whole blocks make the values independent of what follows them, so that a
    # vocabulary padded for another tensor-parallel size has the same first rows.
    drawn = torch.empty(-(-numel // 16) * 16).normal_(0.0, std, generator=generator(seed, name))
    return drawn[:numel].view(shape)


@torch.no_grad()
def initialize(model_chunk: torch.nn.Module, seed: int) -> None:
    """Fill every parameter of a model chunk by `initial_weight`; tensors on the meta device are left alone.

    The full tensor is drawn on every tensor-parallel rank and cut there, so a rank needs host memory for the
    largest parameter (the embedding: 3.7 GB for DeepSeek-V3).
    """
    names = global_names(model_chunk)
    std = unwrap(model_chunk).config.init_method_std
    for local, weight in named_weights(model_chunk).items():
        if weight.device.type == "meta":
            continue
        name, shard = names[local].name, names[local].shard
        full = initial_weight(name, shard.full_shape(weight.shape), std, seed)
        weight.copy_(shard.take(full))
