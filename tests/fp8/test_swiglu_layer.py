"""SwiGLU with its input kept in E4M3 between Linears that know nothing of it: gradients, and the memory given up.

`KeepingLinear` stands for Transformer Engine's: it saves the very tensor that it is given (`save_original_input`)
and quantises it only when the backward pass comes. `tests/fp8/test_te_modules.py` has the real ones.
"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron.fp8 import swiglu_layer
from dsv3_megatron.fp8.swiglu_layer import TakesSwiGLUInput, swiglu_keeping_input
from tests.fp8 import independent
from tests.fp8.test_tiles import matrix


class _Keeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad.matmul(weight), grad.flatten(0, -2).t().matmul(x.flatten(0, -2))


class KeepingLinear(torch.nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return _Keeping.apply(x, self.weight), None


class DownProjection(TakesSwiGLUInput, KeepingLinear):  # type: ignore[misc]
    pass


def by_hand(u: Tensor, probs: Tensor | None, w: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """In float64: forward from u, backward from u as 1×128 tiles of each half in E4M3 hold it."""
    halves = independent.tile(u.detach().float().reshape(-1, u.size(-1) // 2).numpy(), 1, 128)
    kept = torch.from_numpy(halves).view(u.shape).requires_grad_()
    p = None if probs is None else probs.detach().double().requires_grad_()

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
        return hidden if p is None else hidden * p[..., None]

    y = swiglu(u.detach().double()) @ w.double().t()
    hidden = swiglu(kept)
    weight = w.double().requires_grad_()
    (hidden @ weight.t()).backward(dy.double())
    assert kept.grad is not None and weight.grad is not None
    found = {"y": y, "u": kept.grad, "weight": weight.grad}
    return found if p is None else found | {"probs": p.grad}  # type: ignore[dict-item]


def case(shape: tuple[int, ...], half: int, weighted: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows = torch.Size(shape).numel()
    u = matrix((rows, 2 * half), seed=1).clamp_(-8, 8).view(*shape, 2 * half).to(dtype).requires_grad_()
    probs = torch.rand(*shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    w, dy = matrix((24, half), seed=3).clamp_(-8, 8).to(dtype), torch.randn(*shape, 24).to(dtype)
    return u, probs if weighted else None, w, dy  # type: ignore[return-value]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "shape, half",
    [((5,), 128), ((7, 2), 256), ((4, 1), 200), ((0,), 128)],
    ids=["rows", "sequence", "ragged", "empty"],
)
def test_gradients(shape: tuple[int, ...], half: int, weighted: bool) -> None:
    u, probs, w, dy = case(shape, half, weighted, torch.float32)
    layer = DownProjection(w)
    y, _ = layer((u, probs))
    y.backward(dy)
    found = {"y": y.detach(), "u": u.grad, "weight": layer.weight.grad}
    found |= {"probs": probs.grad} if weighted else {}
    for name, expected in by_hand(u, probs, w, dy).items():
        actual = found[name]
        assert actual is not None and actual.shape == expected.shape
        distance = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert not expected.numel() or distance < 1e-5, (name, float(distance))


def test_bf16() -> None:
    u, probs, w, dy = case((6, 2), 256, True, torch.bfloat16)
    layer = DownProjection(w)
    y, _ = layer((u, probs))
    y.backward(dy)
    assert u.grad is not None and u.grad.dtype == y.dtype == torch.bfloat16
    assert probs.grad is not None and probs.grad.dtype == torch.float32
    expected = by_hand(u, probs, w, dy)
    for name, actual in {"y": y, "u": u.grad, "weight": layer.weight.grad, "probs": probs.grad}.items():
        assert actual is not None
        distance = (actual.detach().double() - expected[name]).norm() / expected[name].norm()
        assert distance < 2.0**-7, (name, float(distance))


def test_backward_does_not_start_from_bf16() -> None:
    """The control: gradients at u itself are further away than the bound above by far."""
    u, probs, w, dy = case((64,), 256, False, torch.float32)
    layer = DownProjection(w)
    layer((u, probs))[0].backward(dy)
    exact = u.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    ((torch.nn.functional.silu(gate) * up) @ w.double().t()).backward(dy.double())
    assert u.grad is not None and exact.grad is not None
    assert (u.grad.double() - exact.grad).norm() / exact.grad.norm() > 1e-3


def saved_bytes(layer: torch.nn.Module, argument: Any) -> int:
    """Bytes that a forward pass keeps for its backward: storages that are alive then, but the parameters'."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = layer(argument)
    parameters = {p.untyped_storage()._cdata for p in layer.parameters()}
    assert y.requires_grad
    return sum(storage.nbytes() for key, storage in kept.items() if key not in parameters)


def test_what_is_kept() -> None:
    """One byte per number of u and its scales, and the weights of the rows; the output's memory is given up."""
    u, probs, w, _ = case((40,), 256, True, torch.bfloat16)
    scales = 40 * 2 * 2 * 4
    assert saved_bytes(DownProjection(w), (u, probs)) == u.numel() + scales + probs.nbytes

    class Plain(KeepingLinear):
        def forward(self, argument: Any) -> tuple[Tensor, None]:
            gate, up = argument[0].chunk(2, -1)
            return super().forward(torch.nn.functional.silu(gate) * up)

    assert saved_bytes(Plain(w), (u, None)) > 3 * u.numel()  # the control


def test_memory_comes_back_and_goes() -> None:
    u, probs, w, dy = case((8,), 128, True, torch.bfloat16)
    hidden, kept = swiglu_keeping_input(u, probs)
    before = hidden.detach().clone()
    storage = hidden.untyped_storage()
    y, _ = KeepingLinear(w)(hidden)
    swiglu_layer.compute_again(hidden, kept, until=y)
    assert storage.nbytes() == 0 and kept.tensors is not None
    q = weakref.ref(kept.tensors[0])
    y.backward(dy, retain_graph=True)
    assert storage.nbytes() == before.nbytes and kept.tensors is None
    # It is not the output of before, but that of the input as it was kept.
    assert not torch.equal(hidden, before) and torch.allclose(
        hidden.float(), before.float(), rtol=0.2, atol=0.2
    )
    first = u.grad.clone()  # type: ignore[union-attr]
    u.grad = None
    y.backward(dy)  # a second one finds it restored
    assert torch.equal(u.grad, first)  # type: ignore[arg-type]
    del hidden, y
    assert q() is None


def test_without_gradients_nothing_is_freed() -> None:
    u, probs, w, _ = case((8,), 128, True, torch.bfloat16)
    with torch.no_grad():
        y, _ = DownProjection(w)((u, probs))
    expected, _ = KeepingLinear(w)(swiglu_keeping_input(u, probs)[0])
    assert torch.equal(y, expected) and not y.requires_grad
