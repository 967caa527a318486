"""The fused SwiGLU kernels against autograd and the reference quantisers, in the interpreter."""

import pytest
import torch

from dsv3_megatron import fp8
from tests.fp8.kernels.agreement import assert_swiglu, assert_swiglu_backward, example
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


@pytest.mark.parametrize("kind", ["normal", "zeros", "gradients", "not finite"])
@pytest.mark.parametrize("weighted", [False, True])
def test_backward(interpreted: Interpreter, kind: str, weighted: bool) -> None:
    for seed, (rows, width) in enumerate(((1, 128), (130, 256))):
        u = fp8.quantize_tile(example("normal", rows, 2 * width, seed=seed) * 2)
        grad = example(kind, rows, width, torch.bfloat16, seed=seed + 1)
        assert_swiglu_backward(interpreted, grad, u, weights(rows) if weighted else None, pow2=weighted)


def test_refuses_what_does_not_fit(interpreted: Interpreter) -> None:
    u = fp8.quantize_tile(torch.ones(4, 512))
    with pytest.raises(ValueError, match="gate and up are halves"):
        interpreted("swiglu_quantize_tile", torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"weights of shape \(3,\)"):
        interpreted("swiglu_quantize_tile", torch.ones(4, 6), torch.ones(3))
    with pytest.raises(ValueError, match="grad has 100 columns: the fused backward needs a multiple of 128"):
        interpreted("swiglu_quantize_tile_backward", torch.ones(4, 100), u)
    with pytest.raises(ValueError, match=r"u of shape \(4, 512\): grad of \(4, 128\) needs \(4, 256\)"):
        interpreted("swiglu_quantize_tile_backward", torch.ones(4, 128), u)
