"""The FP8 kernels on the device: the same comparisons as in the interpreter, at V3's sizes too.

Products are promoted to fp32 every 128 of K. That they are is tested with a control: the same product summed by the
tensor cores alone must be far over the bound.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dsv3_megatron import fp8
from tests.fp8.kernels import agreement
from tests.fp8.kernels.agreement import KINDS, example
from tests.gpu import device
from tests.gpu.device import REHEARSAL, sizes

pytestmark = pytest.mark.gpu

# Inside 128 products the tensor cores' accumulator, of about 14 bits, is cut off four times.
TENSOR_CORE_ERROR = 4 * 2.0**-13
PROMOTED_ERROR = TENSOR_CORE_ERROR / 10  # over all of a long K, of Σ|a||b|: only promoted sums are as near
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def call() -> Iterator[Callable[..., Any]]:
    with device.kernels() as kernel:
        yield kernel


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_quantisers(call: Any, kind: str, eps: float) -> None:
    for seed, (rows, columns) in enumerate(
        sizes(((1, 1), (129, 300), (1501, 2048), (4096, 7168)), ((1, 1), (9, 300)))
    ):
        for dtype in (torch.float32, torch.bfloat16):
            agreement.assert_quantizers(
                call, example(kind, rows, columns, dtype, seed), eps, pow2=bool(seed % 2)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_e5m6(call: Any, kind: str) -> None:
    for seed, (rows, columns) in enumerate(sizes(((1, 1), (17, 127), (4096, 16384)), ((1, 1), (5, 127)))):
        agreement.assert_e5m6(call, example(kind, rows, columns, seed=seed))


@pytest.mark.parametrize(
    ("m", "n", "k"),
    sizes([(1, 1, 1), (130, 7, 300), (4096, 576, 7168), (4096, 7168, 1501)], [(1, 1, 1), (13, 7, 300)]),
    ids=str,
)
def test_products(call: Any, m: int, n: int, k: int) -> None:
    a, b = example("normal", m, k), example("normal", n, k, seed=1)
    for w in (fp8.quantize_block(b), fp8.quantize_tile(b)):
        agreement.assert_gemm(call, fp8.quantize_tile(a), w, TENSOR_CORE_ERROR)


@pytest.mark.parametrize(
    "rows", sizes([[100, 0, 170, 1], [0, 0, 0, 3], [1501, 0, 2000, 595]], [[10, 0, 17, 1]]), ids=str
)
def test_grouped_products(call: Any, rows: list[int]) -> None:
    a = fp8.quantize_tile(example("normal", sum(rows), sizes(2048, 256)))
    experts = [
        fp8.quantize_block(example("normal", sizes(7168, 40), sizes(2048, 256), seed=1 + e))
        for e in range(len(rows))
    ]
    agreement.assert_grouped_gemm(call, a, experts, rows, TENSOR_CORE_ERROR)


@pytest.mark.parametrize("kind", ["normal", "zeros", "gradients", "not finite"])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu(call: Any, kind: str, weighted: bool) -> None:
    for rows, width in sizes(((1, 128), (1501, 2048)), ((3, 128),)):
        weights = torch.rand(rows, 1) if weighted else None
        u = example("normal", rows, 2 * width) * 2
        agreement.assert_swiglu(call, example(kind, rows, 2 * width) * 2, weights, pow2=weighted)
        grad = example(kind, rows, width, torch.bfloat16, seed=1)
        agreement.assert_swiglu_backward(call, grad, fp8.quantize_tile(u), weights, pow2=weighted)


def test_sums_are_promoted(call: Any, record_property: Record) -> None:
    """All numbers positive and a long K: what 14 bits lose adds up. The unpromoted product must be over the bound."""
    k = sizes(16384, 8192)
    a, b = (ones_scaled(example("normal", sizes(256, 8), k, seed=seed).abs()) for seed in (0, 1))
    exact = a[0].double() @ b[0].double().t()
    errors = {}
    for name, product in (("promoted", call("gemm_nt", a, b)), ("unpromoted", unpromoted(a, b))):
        errors[name] = float(((product.double() - exact).abs() / exact).max())
        record_property(f"{name}_error", f"{errors[name]:.1e}")
    record_property("bound", f"{PROMOTED_ERROR:.1e}")
    assert errors["promoted"] < PROMOTED_ERROR < errors["unpromoted"]


def ones_scaled(x: torch.Tensor) -> Any:
    """x [M, K] rounded to E4M3, its scales 1."""
    return x.to(torch.float8_e4m3fn), torch.ones(x.size(0), x.size(1) // 128)


def unpromoted(a: Any, b: Any) -> torch.Tensor:
    """The product in the tensor cores' own sums; in a rehearsal as the reference imitates them."""
    if REHEARSAL:
        return fp8.gemm_nt(a, b, accumulate="h800", promote_every=None)
    from tests.gpu.unpromoted import product

    return product(a[0].cuda(), b[0].cuda()).cpu()
