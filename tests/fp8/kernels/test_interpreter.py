"""Why the other tests replace the interpreter's conversions, and that nothing runs where it should not."""

import subprocess
import sys

import pytest
import torch

from dsv3_megatron import fp8
from dsv3_megatron.fp8 import kernels
from tests.fp8.kernels.agreement import example
from tests.fp8.kernels.interpreter import Interpreter


def test_tritons_own_rounding_is_not_the_hardwares() -> None:
    """Triton 3.8's interpreter converts fp32 to E4M3 with three faults: ties go away from zero, a mantissa that
    overflows does not carry into the exponent (2^e instead of 2^(e+1)), and subnormals are cut off. Thus a number is
    at most half its size, or one smallest step of the scale, away from the right one; never more.

    When this test finds them equal, `exact_convert` is no longer needed.
    """
    x = example("normal", 16, 128)
    interpreter = Interpreter(exact_casts=False)
    try:
        q, scale = interpreter("quantize_tile", x)
    finally:
        interpreter.close()
    q_ref, scale_ref = fp8.quantize_tile(x)
    assert torch.equal(scale, scale_ref)  # the scales' arithmetic is plain fp32
    wrong, right = fp8.dequantize(q, scale), fp8.dequantize(q_ref, scale_ref)
    assert bool(((wrong - right).abs() <= right.abs() / 2 + scale * 2.0**-9).all())
    assert bool((wrong != right).any())


@pytest.mark.parametrize(
    "call",
    [
        lambda x, q: kernels.quantize_tile(x),
        lambda x, q: kernels.quantize_tile_t(x),
        lambda x, q: kernels.quantize_block(x),
        lambda x, q: kernels.requantize_transposed(*q),
        lambda x, q: kernels.pack_e5m6(x),
        lambda x, q: kernels.unpack_e5m6(*fp8.pack_e5m6(x)),
        lambda x, q: kernels.gemm_nt(q, q),
        lambda x, q: kernels.grouped_gemm_nt(q, [q], [4]),
        lambda x, q: kernels.swiglu_quantize_tile(x),
        lambda x, q: kernels.swiglu_quantize_tile_backward(x[:, :128].contiguous(), q),
    ],
    ids=kernels.__all__,
)
def test_cpu_tensors_are_an_error(call) -> None:  # type: ignore[no-untyped-def]
    """No fallback: neither to the reference nor to the interpreter."""
    x = torch.ones(4, 256)
    with pytest.raises(
        RuntimeError, match=r"one CUDA device, the tensors are on \['cpu'\]. Without a GPU use the"
    ):
        call(x, fp8.quantize_tile(x))


def test_meta_tensors_are_an_error_outside_the_compiler() -> None:
    with pytest.raises(RuntimeError, match="the tensors are on"):
        kernels.quantize_tile(torch.empty(4, 256, device="meta"))


def test_fp8_imports_without_triton() -> None:
    """Only the kernels need it: the reference runs wherever torch does."""
    code = "import sys; sys.modules['triton'] = None; import dsv3_megatron.fp8"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
