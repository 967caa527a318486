"""The FP8 kernels on the device: the same comparisons as in the interpreter, at V3's sizes too, and their speed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv3_megatron import fp8
from tests.fp8.kernels import agreement
from tests.fp8.kernels.agreement import KINDS, example

pytestmark = pytest.mark.gpu

# Inside 128 products the tensor cores' accumulator, of about 14 bits, is cut off four times.
TENSOR_CORE_ERROR = 4 * 2.0**-13
Record = Callable[[str, object], None]


def moved(value: Any, device: str) -> Any:
    """value with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(v, device) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    return value


def on_device(name: str, *args: Any, **kwargs: Any) -> Any:
    from dsv3_megatron.fp8 import kernels

    return moved(getattr(kernels, name)(*moved(args, "cuda"), **kwargs), "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_quantisers(kind: str, eps: float) -> None:
    for seed, (rows, columns) in enumerate(((1, 1), (129, 300), (1501, 2048), (4096, 7168))):
        for dtype in (torch.float32, torch.bfloat16):
            agreement.assert_quantizers(
                on_device, example(kind, rows, columns, dtype, seed), eps, pow2=bool(seed % 2)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_e5m6(kind: str) -> None:
    for seed, (rows, columns) in enumerate(((1, 1), (17, 127), (4096, 16384))):
        agreement.assert_e5m6(on_device, example(kind, rows, columns, seed=seed))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (130, 7, 300), (4096, 576, 7168), (4096, 7168, 1501)], ids=str
)
def test_products(m: int, n: int, k: int) -> None:
    a, b = example("normal", m, k), example("normal", n, k, seed=1)
    for w in (fp8.quantize_block(b), fp8.quantize_tile(b)):
        agreement.assert_gemm(on_device, fp8.quantize_tile(a), w, TENSOR_CORE_ERROR)


@pytest.mark.parametrize("sizes", [[100, 0, 170, 1], [0, 0, 0, 3], [1501, 0, 2000, 595]], ids=str)
def test_grouped_products(sizes: list[int]) -> None:
    a = fp8.quantize_tile(example("normal", sum(sizes), 2048))
    experts = [fp8.quantize_block(example("normal", 7168, 2048, seed=1 + e)) for e in range(len(sizes))]
    agreement.assert_grouped_gemm(on_device, a, experts, sizes, TENSOR_CORE_ERROR)


@pytest.mark.parametrize("kind", ["normal", "zeros", "gradients", "not finite"])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu(kind: str, weighted: bool) -> None:
    for rows, width in ((1, 128), (1501, 2048)):
        weights = torch.rand(rows, 1) if weighted else None
        u = example("normal", rows, 2 * width) * 2
        agreement.assert_swiglu(on_device, example(kind, rows, 2 * width) * 2, weights, pow2=weighted)
        grad = example(kind, rows, width, torch.bfloat16, seed=1)
        agreement.assert_swiglu_backward(on_device, grad, fp8.quantize_tile(u), weights, pow2=weighted)


@pytest.mark.parametrize(
    "name", ["quantize_tile", "quantize_tile_t", "quantize_block", "pack_e5m6", "swiglu"]
)
def test_speed_of_memory_bound_kernels(name: str, record_property: Record) -> None:
    """GB/s of what is read and written; reported, not judged."""
    from triton.testing import do_bench

    from dsv3_megatron.fp8 import kernels

    kernel = getattr(kernels, "swiglu_quantize_tile" if name == "swiglu" else name)
    x = torch.randn(4096, 14336, device="cuda").bfloat16()
    traffic = sum(t.numel() * t.element_size() for t in (x, *kernel(x)))
    record_property(f"{name}_GB_per_s", round(traffic / do_bench(lambda: kernel(x)) / 1e6))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(4096, 4096, 7168), (4096, 7168, 2048), (4096, 7168, 16384)], ids=str
)
def test_speed_of_products(m: int, n: int, k: int, record_property: Record) -> None:
    """TFLOP/s of the FP8 product, and of torch's in bf16 on the same shapes; reported, not judged."""
    from triton.testing import do_bench

    from dsv3_megatron.fp8 import kernels

    x, w = (torch.randn(rows, k, device="cuda").bfloat16() for rows in (m, n))
    a, b = kernels.quantize_tile(x), kernels.quantize_block(w)
    for name, run in (
        ("fp8", lambda: kernels.gemm_nt(a, b, out_dtype=torch.bfloat16)),
        ("bf16", lambda: x @ w.t()),
    ):
        record_property(f"{name}_TFLOP_per_s", round(2 * m * n * k / do_bench(run) / 1e9))
