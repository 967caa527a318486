"""The FP8 products against the reference, in the interpreter."""

import pytest
import torch

from dsv3_megatron import fp8
from tests.fp8.kernels.agreement import assert_gemm, assert_grouped_gemm, example
from tests.fp8.kernels.interpreter import Interpreter


def test_ragged_shapes(interpreted: Interpreter) -> None:
    for seed, (m, n, k) in enumerate(((1, 1, 1), (5, 129, 127), (130, 7, 300), (129, 200, 256))):
        a, b = example("normal", m, k, seed=seed), example("normal", n, k, seed=seed + 10)
        assert_gemm(interpreted, fp8.quantize_tile(a), fp8.quantize_block(b))  # Fprop, Dgrad
        assert_gemm(interpreted, fp8.quantize_tile(a, eps=0.0), fp8.quantize_tile(b))  # Wgrad


def test_blocks_on_the_left(interpreted: Interpreter) -> None:
    a, b = (
        fp8.quantize_block(example("normal", 200, 140)),
        fp8.quantize_tile(example("normal", 150, 140, seed=1)),
    )
    assert_gemm(interpreted, a, b)


def test_scales_far_apart_and_nan(interpreted: Interpreter) -> None:
    """Each tile of K has its own scale; a NaN reaches its row and no other."""
    a, b = example("normal", 140, 384), example("normal", 70, 384, seed=1)
    a[:, :128] *= 1e4
    a[:, 128:256] *= 1e-6
    a[3, 200] = torch.nan
    b[:, 300:] = 0
    quantized = fp8.quantize_tile(a, eps=0.0), fp8.quantize_block(b)
    assert_gemm(interpreted, *quantized)
    assert bool(interpreted("gemm_nt", *quantized)[3].isnan().all())


def test_bf16_result_is_the_rounded_one(interpreted: Interpreter) -> None:
    a, b = (
        fp8.quantize_tile(example("normal", 20, 200)),
        fp8.quantize_block(example("normal", 30, 200, seed=1)),
    )
    exact = interpreted("gemm_nt", a, b)
    assert torch.equal(interpreted("gemm_nt", a, b, out_dtype=torch.bfloat16), exact.bfloat16())


def test_nothing_to_sum(interpreted: Interpreter) -> None:
    a, b = fp8.quantize_tile(torch.zeros(3, 0)), fp8.quantize_tile(torch.zeros(4, 0))
    assert torch.equal(interpreted("gemm_nt", a, b), torch.zeros(3, 4))


@pytest.mark.parametrize("sizes", [[100, 0, 170, 1], [0, 0, 0, 3], [256, 0, 0, 0], [0, 0, 0, 0]], ids=str)
def test_grouped_with_empty_experts(interpreted: Interpreter, sizes: list[int]) -> None:
    a = fp8.quantize_tile(example("normal", sum(sizes), 200))
    experts = [fp8.quantize_block(example("normal", 140, 200, seed=1 + e)) for e in range(len(sizes))]
    assert_grouped_gemm(interpreted, a, experts, sizes)


def test_refuses_what_does_not_fit(interpreted: Interpreter) -> None:
    a, b = fp8.quantize_tile(torch.ones(6, 200)), fp8.quantize_block(torch.ones(5, 200))
    with pytest.raises(ValueError, match=r"inner dimensions differ: b is \(5, 100\), K is 200"):
        interpreted("gemm_nt", a, fp8.quantize_block(torch.ones(5, 100)))
    with pytest.raises(ValueError, match=r"a's scale has shape \(1, 200\)"):
        interpreted("gemm_nt", fp8.quantize_tile_t(torch.ones(6, 200)), b)
    with pytest.raises(ValueError, match="must name 2 experts and sum to 6 rows"):
        interpreted("grouped_gemm_nt", a, [b, b], [4, 3])
    with pytest.raises(
        ValueError, match=r"b is torch.uint8 with scales in torch.float32: use torch.float8_e4m3fn"
    ):
        interpreted("gemm_nt", a, (b[0].view(torch.uint8), b[1]))
    with pytest.raises(ValueError, match="all experts must have one shape"):
        interpreted("grouped_gemm_nt", a, [b, fp8.quantize_block(torch.ones(4, 200))], [4, 2])
