"""The fused SwiGLU kernels against autograd and the reference quantisers, in the interpreter."""

import pytest
import torch

from dsv3_megatron import fp8
from dsv3_megatron.fp8.kernels import swiglu_reference
from dsv3_megatron.fp8.tiles import expand_scale
from tests.fp8.kernels.agreement import assert_swiglu, assert_swiglu_backward, assert_swiglu_cache, example
from tests.fp8.kernels.interpreter import Interpreter


def weights(rows: int) -> torch.Tensor:
    return torch.rand(rows, 1, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["normal", "zeros", "gradients", "not finite"])
@pytest.mark.parametrize("weighted", [False, True])
def test_forward(interpreted: Interpreter, kind: str, weighted: bool) -> None:
    for seed, (rows, width) in enumerate(((1, 1), (17, 130), (40, 256))):
        u = example(kind, rows, 2 * width, seed=seed) * 2
        assert_swiglu(interpreted, u, weights(rows) if weighted else None, pow2=weighted)
    assert_swiglu(interpreted, example(kind, 20, 300, torch.bfloat16), None, pow2=False)


@pytest.mark.parametrize(
    ("kind", "rows", "width", "weighted"),
    [
        ("normal", 1, 128, False),
        ("normal", 130, 256, True),
        ("zeros", 40, 128, True),
        ("gradients", 129, 128, False),
        ("not finite", 33, 128, True),
    ],
)
def test_backward(interpreted: Interpreter, kind: str, rows: int, width: int, weighted: bool) -> None:
    u = fp8.quantize_tile(example("normal", rows, 2 * width) * 2)
    grad = example(kind, rows, width, torch.bfloat16, seed=1)
    assert_swiglu_backward(interpreted, grad, u, weights(rows) if weighted else None, pow2=weighted)


@pytest.mark.parametrize("kind", ["normal", "zeros", "gradients", "not finite"])
@pytest.mark.parametrize("weighted", [False, True])
def test_input_kept(interpreted: Interpreter, kind: str, weighted: bool) -> None:
    for seed, (rows, half) in enumerate(((1, 1), (17, 130), (40, 256))):
        for dtype in (torch.float32, torch.bfloat16):
            u = (example("normal" if kind == "gradients" else kind, rows, 2 * half, seed=seed) * 2).to(dtype)
            grad = example(kind, rows, half, dtype, seed=9)
            assert_swiglu_cache(interpreted, u, grad, weights(rows) if weighted else None)


def test_reference_is_the_gradient() -> None:
    """Before quantisation, the reference's gradients are autograd's of the definition."""
    u, grad = fp8.quantize_tile(example("normal", 20, 256)), example("normal", 20, 128, seed=1)
    inputs = [fp8.dequantize(*u).double().requires_grad_(), weights(20).double().requires_grad_()]
    gate, up = inputs[0].chunk(2, 1)
    hidden = torch.nn.functional.silu(gate) * up * inputs[1]
    expected = torch.autograd.grad(hidden, inputs, grad.double())
    actual = swiglu_reference.swiglu_quantize_tile_backward(grad, u, weights(20))
    torch.testing.assert_close(actual.grad_weights, expected[1].float(), rtol=1e-5, atol=1e-5)
    for matrix, quantized in (
        (expected[0], actual.grad_u),
        (expected[0].t(), actual.grad_u_t),
        (hidden.t(), actual.hidden_t),
    ):
        exact = matrix.detach().float()
        # E4M3 keeps 4 significant bits, and 2^-9 of the scale below its normal numbers.
        bound = exact.abs() * 2.0**-4 + expand_scale(quantized[1], exact.shape) * 2.0**-10
        assert bool(((fp8.dequantize(*quantized) - exact).abs() <= bound * 1.001).all())


def test_refuses_what_does_not_fit(interpreted: Interpreter) -> None:
    u = fp8.quantize_tile(torch.ones(4, 512))
    with pytest.raises(ValueError, match="gate and up are halves"):
        interpreted("swiglu_quantize_tile", torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"weights of shape \(3,\)"):
        interpreted("swiglu_quantize_tile", torch.ones(4, 6), torch.ones(3))
    with pytest.raises(ValueError, match="grad has 100 columns: the fused backward needs a multiple of 128"):
        interpreted("swiglu_quantize_tile_backward", torch.ones(4, 100), u)
    with pytest.raises(ValueError, match=r"grad of shape \(4, 100\): u of \(4, 512\) needs \(4, 256\)"):
        interpreted("swiglu_gradients", torch.ones(4, 100), u)
    with pytest.raises(ValueError, match=r"scale of shape \(4, 3\): halves of \(4, 512\) have \(4, 4\)"):
        interpreted("swiglu_from_cache", (u[0], u[1][:, :3]), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"u of shape \(4, 512\): grad of \(4, 128\) needs \(4, 256\)"):
        interpreted("swiglu_quantize_tile_backward", torch.ones(4, 128), u)
