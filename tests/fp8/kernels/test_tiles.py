"""The quantising kernels against the reference, bit for bit, in the interpreter."""

import pytest
import torch

from dsv3_megatron import fp8
from tests.fp8.kernels.agreement import KINDS, assert_quantizers, assert_same, example
from tests.fp8.kernels.interpreter import Interpreter

RAGGED = ((1, 1), (5, 127), (129, 128), (130, 300))


# Without a floor of amax zeros and the smallest numbers are what differs.
WITHOUT_FLOOR = [
    pytest.param(0.0, kind, marks=() if kind in ("zeros", "denormal") else pytest.mark.slow) for kind in KINDS
]


@pytest.mark.parametrize("eps, kind", [*((1e-4, kind) for kind in KINDS), *WITHOUT_FLOOR])
def test_ragged_shapes(interpreted: Interpreter, kind: str, eps: float) -> None:
    for seed, (rows, columns) in enumerate(RAGGED):
        x = example(kind, rows, columns, seed=seed)
        assert_quantizers(interpreted, x, eps, pow2=bool(seed % 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(interpreted: Interpreter, dtype: torch.dtype) -> None:
    assert_quantizers(interpreted, example("not finite", 40, 200, dtype), 1e-4, pow2=False)


def test_every_code_of_a_tile(interpreted: Interpreter) -> None:
    """All 254 numbers of E4M3 come back as they were, under powers of two and under other scales."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    x = codes.view(2, 128) * torch.tensor([[2.0**-3], [1.0]])
    assert_same(interpreted("quantize_tile", x, pow2=True), fp8.quantize_tile(x, pow2=True))
    # Half way between two neighbours: to even. The scale is 1 since 448 is in every tile.
    values = codes[codes >= 0].unique()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.stack(
        [
            torch.cat([middles[:125], torch.tensor([448.0])]),
            -torch.cat([middles[:125], torch.tensor([448.0])]),
        ]
    )
    assert_same(interpreted("quantize_tile", x), fp8.quantize_tile(x))


def test_an_empty_matrix_and_one_without_order(interpreted: Interpreter) -> None:
    for shape in ((0, 256), (3, 0)):
        q, scale = interpreted("quantize_tile", torch.zeros(shape))
        assert tuple(q.shape) == shape and tuple(scale.shape) == (shape[0], -(-shape[1] // 128))
    x = example("normal", 150, 140).t()
    assert not x.is_contiguous()
    assert_quantizers(interpreted, x, 1e-4, pow2=False)


@pytest.mark.parametrize(
    ("x", "eps", "message"),
    [
        (torch.zeros(3), 1e-4, r"expected a matrix, got shape \(3,\)"),
        (torch.zeros(3, 3), -1.0, r"eps=-1.0: the floor of amax must not be negative"),
    ],
)
def test_refuses_as_the_reference_does(
    interpreted: Interpreter, x: torch.Tensor, eps: float, message: str
) -> None:
    for name in ("quantize_tile", "quantize_tile_t", "quantize_block"):
        with pytest.raises(ValueError, match=message):
            getattr(fp8, name)(x, eps=eps)
        with pytest.raises(ValueError, match=message):
            interpreted(name, x, eps=eps)


def test_scale_of_other_tiles_is_refused(interpreted: Interpreter) -> None:
    q, scale = fp8.quantize_block(torch.ones(200, 200))
    with pytest.raises(
        ValueError, match=r"scale of shape \(2, 2\): 1×128 tiles of \(200, 200\) have \(200, 2\)"
    ):
        interpreted("requantize_transposed", q, scale)
