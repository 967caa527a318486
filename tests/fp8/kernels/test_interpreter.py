"""Why the other tests replace the interpreter's conversions, and that nothing runs where it should not."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron import fp8
from dsv3_megatron.fp8 import kernels
from dsv3_megatron.fp8.kernels import launch, resources
from dsv3_megatron.fp8.tiles import Quantized
from tests.fp8.kernels.agreement import example
from tests.fp8.kernels.interpreter import Interpreter

CALLS: dict[str, Callable[[Tensor, Quantized], Any]] = {
    "decode_message": lambda x, q: kernels.decode_message(fp8.encode_message(x, 0.0), 256),
    "dequantize": lambda x, q: kernels.dequantize(*q),
    "encode_message": lambda x, q: kernels.encode_message(x, 0.0),
    "gemm_nt": lambda x, q: kernels.gemm_nt(q, q),
    "grouped_gemm_nt": lambda x, q: kernels.grouped_gemm_nt(q, [q], [4]),
    "pack_e5m6": lambda x, q: kernels.pack_e5m6(x),
    "quantize_block": lambda x, q: kernels.quantize_block(x),
    "quantize_tile": lambda x, q: kernels.quantize_tile(x),
    "quantize_tile_t": lambda x, q: kernels.quantize_tile_t(x),
    "requantize_transposed": lambda x, q: kernels.requantize_transposed(*q),
    "swiglu_and_cache": lambda x, q: kernels.swiglu_and_cache(x),
    "swiglu_from_cache": lambda x, q: kernels.swiglu_from_cache(q, dtype=torch.float32),
    "swiglu_gradients": lambda x, q: kernels.swiglu_gradients(x[:, :128].contiguous(), q),
    "swiglu_quantize_tile": lambda x, q: kernels.swiglu_quantize_tile(x),
    "swiglu_quantize_tile_backward": lambda x, q: kernels.swiglu_quantize_tile_backward(
        x[:, :128].contiguous(), q
    ),
    "unpack_e5m6": lambda x, q: kernels.unpack_e5m6(*fp8.pack_e5m6(x)),
}


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
    CALLS.values(),
    ids=CALLS,
)
def test_cpu_tensors_are_an_error(call) -> None:  # type: ignore[no-untyped-def]
    """No fallback: neither to the reference nor to the interpreter."""
    assert list(CALLS) == kernels.__all__
    x = torch.ones(4, 256)
    with pytest.raises(
        RuntimeError, match=r"one CUDA device, the tensors are on \['cpu'\]. Without a GPU use the"
    ):
        call(x, fp8.quantize_tile(x))


def test_a_triton_without_knobs_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.3, of torch 2.7, has no `triton.knobs`: the same error as above, and the variable decides."""
    monkeypatch.delattr(launch.triton, "knobs")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not launch.is_interpreted()
    with pytest.raises(RuntimeError, match="one CUDA device"):
        kernels.quantize_tile(torch.ones(4, 256))
    assert Path(resources._cuobjdump()).is_file()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch.is_interpreted()


def test_meta_tensors_are_an_error_outside_the_compiler() -> None:
    with pytest.raises(RuntimeError, match="the tensors are on"):
        kernels.quantize_tile(torch.empty(4, 256, device="meta"))


def test_fp8_imports_without_triton() -> None:
    """Only the kernels need it: the reference runs wherever torch does."""
    code = "import sys; sys.modules['triton'] = None; import dsv3_megatron.fp8"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
