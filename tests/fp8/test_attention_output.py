"""The attention's output kept once in E5M6: against gradients with the rounding written out, and freed in bf16.

`FlashAttention` below stands for the fused kernels: as they do, it keeps its output for the gradient's row sums.
"""

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_megatron.fp8 import pack_e5m6, unpack_e5m6
from dsv3_megatron.fp8.attention_output import KeepsAttentionOutput, KeepsInput, SavedOnce
from dsv3_megatron.specs import reference
from dsv3_megatron.specs.linear import RowLinear, num_pending_weight_grads, run_pending_weight_grads
from dsv3_megatron.specs.mla import ReferenceSelfAttention
from tests.specs.models import build, micro_config, random_batch
from tests.specs.test_recompute import PUBLISHED

SIZES: dict[str, Any] = {"num_layers": 2, "mtp_num_layers": 1, "params_dtype": torch.bfloat16, "bf16": True}


def rounded(x: Tensor) -> Tensor:
    """x as E5M6 holds it."""
    matrix = x.reshape(-1, x.size(-1))
    return unpack_e5m6(*pack_e5m6(matrix), matrix.size(1)).view(x.shape).to(x.dtype)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, by_hand: bool) -> Tensor:
        """q, k [s, b, n, d], v [s, b, n, d_v] → [s, b, n·d_v]."""
        probs = _probs(q, k, scale)
        out = torch.einsum("bnst,tbnd->sbnd", probs, v.float()).to(v.dtype).flatten(2)
        ctx.save_for_backward(q, k, v, rounded(out) if by_hand else out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        grad_out, out = (x.view(*v.shape).float() for x in (grad, out))
        probs = _probs(q, k, ctx.scale)
        row_sums = torch.einsum("sbnd,sbnd->bns", grad_out, out)
        grad_probs = torch.einsum("sbnd,tbnd->bnst", grad_out, v.float())
        grad_scores = probs * (grad_probs - row_sums[..., None]) * ctx.scale
        return (
            torch.einsum("bnst,tbnd->sbnd", grad_scores, k.float()).to(q.dtype),
            torch.einsum("bnst,sbnd->tbnd", grad_scores, q.float()).to(k.dtype),
            torch.einsum("bnst,sbnd->tbnd", probs, grad_out).to(v.dtype),
            None,
            None,
        )


def _probs(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("sbnd,tbnd->bnst", q.float(), k.float()) * scale
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")).softmax(-1)


class FlashAttention(torch.nn.Module):
    by_hand = False

    def __init__(self, *args: Any, softmax_scale: float, **unused: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **unused: Any) -> Tensor:
        return _Flash.apply(q, k, v, self.scale, self.by_hand)


class FlashByHand(FlashAttention):
    by_hand = True


class KeepingAttention(KeepsAttentionOutput, ReferenceSelfAttention):
    pass


class KeepingLinear(KeepsInput, RowLinear):
    pass


class _LinearByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rounded(x), weight)
        return x.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad.matmul(weight), grad.flatten(0, 1).t().matmul(x.flatten(0, 1))


class LinearByHand(RowLinear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _LinearByHand.apply(x, self.weight), None


KEEPING = replace(
    reference.BACKEND,
    self_attention=KeepingAttention,
    attention_output=KeepingLinear,
    core_attention=FlashAttention,
)
BY_HAND = replace(reference.BACKEND, attention_output=LinearByHand, core_attention=FlashByHand)
NEITHER = replace(reference.BACKEND, core_attention=FlashAttention)


def count_packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    pack = SavedOnce.pack

    def counting(self: SavedOnce, x: Tensor) -> int:
        counts.append(pack(self, x))
        return counts[-1]

    monkeypatch.setattr(SavedOnce, "pack", counting)
    return counts


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each call of `SavedOnce.pack` has replaced."""
    return count_packed(monkeypatch)


def gradients(
    backend: Any, monkeypatch: pytest.MonkeyPatch, delay: bool = False, **more: Any
) -> dict[str, Tensor]:
    """Of two microbatches in flight."""
    monkeypatch.setattr(reference, "BACKEND", backend)
    config = micro_config(**SIZES, **more)
    config.transformer.delay_wgrad_compute = delay
    model = build(config)
    losses = [model(**random_batch(seed=seed), attention_mask=None).mean() for seed in (0, 1)]
    for loss in losses:
        loss.backward()
    while num_pending_weight_grads(model):
        run_pending_weight_grads(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"delay": True},
        {"recompute_granularity": "selective", "recompute_modules": PUBLISHED},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
    ids=["", "delayed", "published recompute", "full recompute"],
)
def test_gradients(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch, packed: list[int]) -> None:
    """Bit for bit those of modules that round what they keep; others than without rounding."""
    expected = gradients(BY_HAND, monkeypatch)
    assert not packed
    got = gradients(KEEPING, monkeypatch, **more)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    layers = 3 * 2  # of two microbatches, MTP's included
    assert packed.count(2) == layers  # the attention's and the Linear's, one copy
    exact = gradients(NEITHER, monkeypatch)
    for name in (
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_kv_up_proj.weight",
    ):
        assert not torch.equal(exact[name], expected[name]), name


@pytest.mark.usefixtures("single_rank")
def test_recomputed_attention_keeps_no_output(monkeypatch: pytest.MonkeyPatch, packed: list[int]) -> None:
    """Its second run is in the backward pass, and used there at once; only the Linear keeps."""
    recompute: dict[str, Any] = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    got = gradients(KEEPING, monkeypatch, **recompute)
    assert packed == [1] * 6
    linear_only = replace(BY_HAND, core_attention=FlashAttention)
    expected = gradients(linear_only, monkeypatch)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_output_is_freed() -> None:
    """What autograd holds after the forward pass are the 12 bits; the numbers come back for both users."""
    memory = np.zeros((8, 1, 256), np.float32)
    alive = weakref.ref(memory)
    output = [torch.from_numpy(memory)]
    del memory

    class KeepsOutput(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = output.pop().copy_(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0]

    torch.manual_seed(0)
    x = torch.randn(8, 1, 256, requires_grad=True)
    weight = torch.randn(1, 256, requires_grad=True)
    saved = SavedOnce()
    with saved.watching():
        y = KeepsOutput.apply(x)
    with saved.watching():
        z = y.view(8, 256).matmul(weight.t())
    assert saved.pack(y) == 2
    kept = rounded(y.detach())
    del y
    assert alive() is None
    z.sum().backward()
    assert torch.equal(weight.grad, kept.sum((0, 1))[None])
    assert torch.equal(x.grad, weight.detach() * kept)


def test_other_tensors_are_kept_as_they_are() -> None:
    """Part of the memory, other numbers in it, or another type: not the same tensor."""
    x = torch.randn(4, 128)
    saved = SavedOnce()
    slots = [saved._save(t) for t in (x[:2], x.t(), x.clone(), x.view(torch.int32))]
    assert saved.pack(x) == 0
    for slot, t in zip(slots, (x[:2], x.t(), x.clone(), x.view(torch.int32)), strict=True):
        assert torch.equal(slot.restore(), t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bf16_holds_every_number(dtype: torch.dtype) -> None:
    """Of all 4096 codes under scales far apart."""
    packed = (
        torch.tensor([[i & 255, (i >> 8) | ((j & 15) << 4), j >> 4] for i, j in _pairs()]).byte().view(1, -1)
    )
    for exponent in (-80, 0, 80):
        scale = torch.full((1, 32), 2.0**exponent)
        expected = unpack_e5m6(packed, scale)
        got = unpack_e5m6(packed, scale, dtype=dtype)
        assert got.dtype == dtype
        assert torch.equal(got.float().nan_to_num(), expected.nan_to_num())


def _pairs() -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(0, 4096, 2)]
