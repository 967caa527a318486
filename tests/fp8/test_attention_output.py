"""The attention's output kept once in E5M6: against gradients with the rounding written out, and its memory freed.

`FlashAttention` below stands for the fused kernels: as they do, it keeps its output for the gradient's row sums.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron.backends import reference
from dsv3_megatron.backends.linear import RowLinear
from dsv3_megatron.fp8 import attention_output, pack_e5m6, unpack_e5m6
from dsv3_megatron.fp8.attention_output import KeepsInputInE5M6, keep_in_e5m6
from tests.specs.models import gradients_of, micro_config
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


class KeepingLinear(KeepsInputInE5M6, RowLinear):
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


KEEPING = replace(reference.BACKEND, attention_output=KeepingLinear, core_attention=FlashAttention)
BY_HAND = replace(reference.BACKEND, attention_output=LinearByHand, core_attention=FlashByHand)
NEITHER = replace(reference.BACKEND, core_attention=FlashAttention)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each call of `keep_in_e5m6` has returned."""
    calls: list[bool] = []
    keep = attention_output.keep_in_e5m6

    def counting(x: Tensor, until: Tensor) -> bool:
        calls.append(keep(x, until))
        return calls[-1]

    monkeypatch.setattr(attention_output, "keep_in_e5m6", counting)
    return calls


def gradients(
    backend: Any, monkeypatch: pytest.MonkeyPatch, delay: bool = False, **more: Any
) -> dict[str, Tensor]:
    """Of two microbatches in flight."""
    monkeypatch.setattr(reference, "BACKEND", backend)
    return gradients_of(micro_config(**SIZES, **more), delay)


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
def test_gradients(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kept: list[bool]) -> None:
    """Bit for bit those of modules that round what they keep; others than without rounding."""
    expected = gradients(BY_HAND, monkeypatch)
    assert not kept
    got = gradients(KEEPING, monkeypatch, **more)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    assert kept == [True] * 3 * 2  # layers, MTP's included, of two microbatches
    exact = gradients(NEITHER, monkeypatch)
    for name in (
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_kv_up_proj.weight",
    ):
        assert not torch.equal(exact[name], expected[name]), name


@pytest.mark.usefixtures("single_rank")
def test_recomputed_attention_keeps_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second run is in the backward pass, and used there at once; only the Linear keeps."""
    recompute: dict[str, Any] = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    got = gradients(KEEPING, monkeypatch, **recompute)
    expected = gradients(replace(BY_HAND, core_attention=FlashAttention), monkeypatch)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_memory_is_given_up_until_the_backward_pass() -> None:
    """Both users find the same rounded numbers, in a second backward pass too."""

    class KeepsOutput(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.clone()
            ctx.save_for_backward(y)
            ctx.marker = marker.pop()
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0]

    class Marker:
        pass

    marker = [Marker()]
    alive = weakref.ref(marker[0])
    torch.manual_seed(0)
    x = torch.randn(8, 1, 256, requires_grad=True)
    weight = torch.randn(1, 256, requires_grad=True)
    y = KeepsOutput.apply(x)
    expected = rounded(y.detach())
    assert not torch.equal(expected, y)
    z = y.view(8, 256).matmul(weight.t())
    assert keep_in_e5m6(y, until=z) and y.untyped_storage().nbytes() == 0
    z.sum().backward(retain_graph=True)
    assert torch.equal(weight.grad, expected.sum((0, 1))[None])
    assert torch.equal(x.grad, weight.detach() * expected)
    z.sum().backward()
    assert torch.equal(x.grad, 2 * weight.detach() * expected)
    assert alive() is not None
    del y, z
    assert alive() is None  # the graph is gone: the hook holds nothing of it


@pytest.mark.parametrize("part", [lambda x: x[:4], lambda x: x[..., :128], lambda x: x.transpose(0, 1)])
def test_part_of_something_larger_stays(part: Callable[[Tensor], Tensor]) -> None:
    whole = torch.randn(8, 2, 256, requires_grad=True) * 1
    x = part(whole)
    y = x * 2
    before = whole.detach().clone()
    assert not keep_in_e5m6(x, until=y)
    y.sum().backward()
    assert torch.equal(whole, before)


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
