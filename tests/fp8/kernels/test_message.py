"""The kernels of FP8 dispatch against the plain encoding and decoding, bit for bit, and what they allocate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron import fp8
from dsv3_megatron.fp8 import kernels
from dsv3_megatron.fp8.kernels.cases import matrix, tiled
from dsv3_megatron.fp8.kernels.launch import Launch, recording
from tests.fp8.kernels.agreement import KINDS, assert_dequantizes, assert_message, example
from tests.fp8.kernels.allocations import Allocations
from tests.fp8.kernels.interpreter import Interpreter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_messages(interpreted: Interpreter, kind: str, eps: float) -> None:
    for seed, (rows, columns) in enumerate(((1, 1), (33, 200), (40, 384))):
        assert_message(interpreted, example(kind, rows, columns, seed=seed), eps)
    assert_message(
        interpreted, example(kind, 5, 1792, torch.bfloat16), eps
    )  # rows that start at multiples of 2


def test_scales_apart(interpreted: Interpreter) -> None:
    """DeepEP delivers them so, and so are caches; one per 128×128 block too."""
    for seed, (rows, columns) in enumerate(((1, 1), (33, 200), (130, 384))):
        x = example("not finite" if seed == 1 else "normal", rows, columns, seed=seed)
        assert_dequantizes(interpreted, *fp8.quantize_tile(x))
        assert_dequantizes(interpreted, *fp8.quantize_block(x))


def test_every_byte_and_every_exponent(interpreted: Interpreter) -> None:
    """All 256 codes under all scales from 2^-126 on: a message is read as it is, whoever wrote it."""
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).repeat(254, 1)
    exponents = torch.arange(1, 255, dtype=torch.uint8).repeat_interleave(2)[:, None]
    message = torch.cat([codes, exponents], 1)
    actual, expected = interpreted("decode_message", message, 128), fp8.decode_message(message, 128)
    assert torch.equal(actual.nan_to_num(0), expected.nan_to_num(0))
    assert torch.equal(actual.isnan(), expected.isnan())


def test_decoding_allocates_the_result_and_nothing_else() -> None:
    """One kernel from bytes to bf16, counted as a GPU would; the plain decoding makes over ten times as much."""
    launches: list[Launch] = []

    def allocated(function: Callable[..., Tensor], *args: Any) -> int:
        launches.clear()
        with recording(launches.append), Allocations() as counted:
            function(*args)
        assert len(launches) == 1
        return counted.bytes

    rows, columns = 4096 * 8, 7168
    result = 2 * rows * columns
    message = matrix(rows, columns + columns // 128, torch.uint8)
    assert allocated(kernels.decode_message, message, columns, torch.bfloat16) == result
    assert allocated(kernels.encode_message, matrix(rows, columns), 1e-4) == message.nbytes
    assert allocated(kernels.dequantize, *tiled(rows, columns), torch.bfloat16) == result
    with Allocations() as plain:
        fp8.decode_message(fp8.encode_message(torch.ones(64, 1024), 1e-4), 1024, torch.bfloat16)
    assert plain.bytes > 10 * 64 * 1024 * 2


def test_refuses_shapes_that_do_not_fit(interpreted: Interpreter) -> None:
    message = fp8.encode_message(torch.ones(4, 200), 0.0)
    with pytest.raises(ValueError, match="num_columns=300"):
        interpreted("decode_message", message, 300)
    q, scale = fp8.quantize_tile(torch.ones(4, 200))
    with pytest.raises(ValueError, match=r"scale has shape \(4, 1\)"):
        interpreted("dequantize", q, scale[:, :1])
