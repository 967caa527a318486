"""What a forward pass leaves alive for its backward, tensor by tensor, each with the module that made it."""

import gc
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3_megatron.fp8 import policy
from tests.plan.live_tensors import LiveTensors

# Multiples of 128, and every width different from every other.
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "moe_layer_freq": [0, 1, 1],
    "mtp_num_layers": 1,
    "hidden_size": 256,
    "ffn_hidden_size": 640,
    "moe_ffn_hidden_size": 128,
    "moe_shared_expert_intermediate_size": 384,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
}


class Kept(NamedTuple):
    """A storage that lives after the forward pass."""

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Live(LiveTensors):
    """Quantised tensors of Transformer Engine have no memory but that of the tensors in them, which are seen too."""

    def _see(self, tensor: Tensor) -> None:
        if not hasattr(tensor, "_rowwise_data"):
            super()._see(tensor)


def kept_by_module(model: torch.nn.Module, forward: Callable[[], Tensor]) -> dict[str, list[Kept]]:
    """By the name of the module that made them; run the model once before, so that what is made once is there.

    The output of `forward` itself, and what existed before, is left out.
    """
    names: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, i, name=name: names.append(name)))
        handles.append(module.register_forward_hook(lambda m, i, o: _drop(names), always_call=True))
    gc.collect()
    ignored = [t for t in map(_tensor, gc.get_objects()) if t is not None]
    live = _Live(ignored=ignored, label=lambda t: (names[-1] if names else "", tuple(t.shape), t.dtype))
    try:
        with live:
            output = forward()
            gc.collect()
            alive = live.snapshot()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[Kept]] = defaultdict(list)
    for (name, shape, dtype), size in alive:
        if shape != tuple(output.shape):
            found[name].append(Kept(size, shape, dtype))
    return dict(found)


def _drop(names: list[str]) -> None:
    names.pop()


def _tensor(thing: Any) -> Tensor | None:
    """Thing, if it is a tensor with memory of its own."""
    is_tensor = issubclass(type(thing), Tensor)  # not isinstance: it would wake torch's lazy modules
    return thing if is_tensor and not hasattr(thing, "_rowwise_data") else None


def assert_table(
    model: torch.nn.Module, found: dict[str, list[Kept]], transformer_impl: str, tokens: int
) -> None:
    """Each row of the policy that says what is kept, against what each of its modules kept of `tokens` tokens.

    A Linear keeps as many bytes of 8-bit numbers as the row says, and no copy of its input in a wider format (one that
    begins with a norm keeps the norm's input); those of all experts together as many as tokens were routed to them.
    """
    checked = set()
    routed: dict[str, float] = defaultdict(float)
    for name, module in model.named_modules():
        row = policy.row_of(name)
        owns = next(module.parameters(recurse=False), None) is not None or name.endswith("core_attention")
        if row is None or not owns or not row.kept(transformer_impl):
            continue
        checked.add(row.what)
        kept, says = found.get(name, []), row.kept(transformer_impl)
        if row.what == "attention operators":  # rope is applied by the module around them
            dtype = torch.bfloat16 if "BF16" in says else torch.float32
            around = found.get(name.rpartition(".")[0], [])
            assert sum(k.dtype == dtype and len(k.shape) >= 3 for k in [*kept, *around]) >= 3, (name, kept)
        elif row.what == "norms":
            assert says == "input in BF16" and not _eight_bits(kept), (name, kept)
        else:
            rows = _assert_linear(name, module, says, kept, tokens)
            if ".experts." in name:
                routed[re.sub(r"\.local_experts\.\d+", "", name)] += rows
    assert min(routed.values()) >= tokens * model.config.moe_router_topk, routed
    assert checked == {row.what for row in policy.POLICY if row.kept(transformer_impl)}


BYTES = {  # per element of the input
    "input in E4M3": 1.0,
    "input in E5M6": 1.5,
    "SwiGLU's input in E4M3": 2.0,  # both halves
    "input in BF16": 0.0,  # somebody else's tensor
}


def _assert_linear(name: str, module: Any, says: str, kept: list[Kept], tokens: int) -> float:
    """Returns the rows that it keeps in 8-bit numbers."""
    weight = module.weight if getattr(module, "weight", None) is not None else module.weight0
    outputs, inputs = weight.shape
    (per_element,) = (size for what, size in BYTES.items() if says.startswith(what))
    rows = _eight_bits(kept) / (inputs * per_element or 1)
    if ".experts." in name:  # of the tokens that were routed there
        assert rows == int(rows), (name, kept)
    else:
        assert rows == (tokens if per_element else 0), (name, says, kept)
    scales = 4 * inputs * -(-tokens // 128)  # of a matrix by 128×1
    if inputs != outputs:
        wide = [
            k
            for k in kept
            if k.dtype.itemsize > 1 and k.shape[-1] == inputs and len(k.shape) > 1 and k.bytes > scales
        ]
        norms = 1 if hasattr(module, "layer_norm_weight") else 0  # a norm in front keeps its own input
        assert len(wide) <= norms, (name, says, wide)
    return rows


def _eight_bits(kept: list[Kept]) -> int:
    return sum(k.bytes for k in kept if k.dtype in (torch.uint8, torch.float8_e4m3fn))
