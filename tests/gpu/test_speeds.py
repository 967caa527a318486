"""Speeds, reported and not judged: kernels against the limit of a copy, products against bf16 and scaled_mm."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv3_megatron import fp8
from tests.gpu.device import DEVICE, REHEARSAL, kernels, milliseconds, sizes

pytestmark = pytest.mark.gpu
Record = Callable[[str, object], None]
ROWS, COLUMNS = sizes((4096, 14336), (4, 512))
PRODUCTS = sizes([(4096, 4096, 7168), (4096, 7168, 2048), (4096, 7168, 16384)], [(4, 16, 512)])


def kernel(name: str, *args: Any, **kwargs: Any) -> Any:
    """A function of the kernels, its results where they are."""
    if REHEARSAL:
        with kernels() as call:
            return call(name, *args, **kwargs)
    return getattr(importlib.import_module("dsv3_megatron.fp8.kernels"), name)(*args, **kwargs)


def record_speed(record: Record, name: str, work: float, way: Callable[[], Any]) -> None:
    """`work` per second; in a rehearsal the call is made, and nothing is said of its speed."""
    took = milliseconds(way)
    record(name, "not measured" if REHEARSAL else round(work / took * 1e3))


def random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device=DEVICE).bfloat16()


def test_copy_limit(record_property: Record) -> None:
    """Bytes read and written per second by a copy on the device: what a kernel bound by memory can reach."""
    x = torch.empty(sizes(1 << 32, 1 << 20), dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    record_speed(record_property, "copy_GB_per_s", 2 * x.numel() / 1e9, lambda: y.copy_(x))


@pytest.mark.parametrize(
    "name", ["quantize_tile", "quantize_tile_t", "quantize_block", "pack_e5m6", "swiglu_quantize_tile"]
)
def test_kernels_bound_by_memory(name: str, record_property: Record) -> None:
    """GB/s of what is read and written once."""
    x = random(ROWS, COLUMNS)
    found = kernel(name, x)
    traffic = sum(t.numel() * t.element_size() for t in (x, *found))
    record_speed(record_property, f"{name}_GB_per_s", traffic / 1e9, lambda: kernel(name, x))


@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS, ids=str)
def test_products(m: int, n: int, k: int, record_property: Record) -> None:
    """TFLOP/s of the same product by our kernel, by torch in bf16 and by cuBLASLt's block scaling."""
    x, w = random(m, k), random(n, k)
    a, b = kernel("quantize_tile", x), kernel("quantize_block", w)
    ways = {
        "kernel": lambda: kernel("gemm_nt", a, b, out_dtype=torch.bfloat16),
        "bf16": lambda: x @ w.t(),
    }
    if importlib.util.find_spec("dsv3_megatron.fp8.scaled_mm") is not None:
        ways["scaled_mm"] = lambda: by_scaled_mm(a, b)
    exact = fp8.dequantize(*a) @ fp8.dequantize(*b).t()
    for name, way in ways.items():
        gap = float((way().float() - exact).norm() / exact.norm())
        assert gap < 0.06, f"{name} is another product: {gap:.2e}"
        record_speed(record_property, f"{name}_TFLOP_per_s", 2 * m * n * k / 1e12, way)


def by_scaled_mm(a: Any, b: Any) -> torch.Tensor:
    """cuBLASLt's product; in a rehearsal its operands are laid out and the reference multiplies."""
    module = importlib.import_module("dsv3_megatron.fp8.scaled_mm")
    if REHEARSAL:
        module.arguments(a, b)
        return fp8.gemm_nt(a, b)
    return module.scaled_mm(a, b, torch.bfloat16)
