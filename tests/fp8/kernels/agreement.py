"""What it means that a kernel agrees with its reference; the interpreter's tests and the GPU's both call these.

`call(name, *args)` runs the kernel of that name and returns tensors on the CPU, where the reference runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron import fp8
from dsv3_megatron.fp8.kernels import swiglu_reference
from dsv3_megatron.fp8.tiles import Quantized, dequantize

Call = Callable[..., Any]
KINDS = ("normal", "zeros", "gradients", "denormal", "huge", "not finite")


def example(kind: str, rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A matrix that is hard in one way; ±inf and NaN sit among normal numbers, one tile has nothing else."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "zeros":
        x[:, : max(columns // 2, 1)] = 0  # whole tiles, and part of one
        x[: rows // 2] = -0.0
    elif kind in ("gradients", "denormal", "huge"):
        x *= {"gradients": 1e-9, "denormal": 1e-39, "huge": 1e38}[kind]
        x.clamp_(-3e38, 3e38)
    elif kind == "not finite":
        where = torch.randint(0, 20, x.shape, generator=generator)
        for code, value in ((0, torch.inf), (1, -torch.inf), (2, torch.nan)):
            x[where == code] = value
        x[0, :128] = torch.inf
    return x.to(dtype)


def assert_same(actual: Quantized, expected: Quantized) -> None:
    """Scales and codes bit for bit; a NaN is a NaN, whatever its sign."""
    (q, scale), (q_ref, scale_ref) = actual, expected
    assert q.shape == q_ref.shape and q.dtype == q_ref.dtype
    assert scale.dtype == torch.float32
    assert torch.equal(scale, scale_ref), _differing("scales", scale, scale_ref)
    q, q_ref = q.view(torch.uint8).int(), q_ref.view(torch.uint8).int()
    nan = (q & 127) == 127
    assert torch.equal(nan, (q_ref & 127) == 127), "NaN in other places"
    assert torch.equal(q[~nan], q_ref[~nan]), _differing("codes", q, q_ref)


def assert_quantizers(call: Call, x: Tensor, eps: float, pow2: bool) -> None:
    options: dict[str, Any] = {"eps": eps, "pow2": pow2}
    for name in ("quantize_tile", "quantize_tile_t", "quantize_block"):
        assert_same(call(name, x, **options), getattr(fp8, name)(x, **options))
    q, scale = fp8.quantize_tile(x, **options)
    expected = fp8.requantize_transposed(q, scale, **options)
    assert_same(call("requantize_transposed", q, scale, **options), expected)


def assert_e5m6(call: Call, x: Tensor) -> None:
    """Bytes, scales and numbers, bit for bit (NaN as NaN)."""
    packed, scale = call("pack_e5m6", x)
    packed_ref, scale_ref = fp8.pack_e5m6(x)
    assert torch.equal(scale, scale_ref), _differing("scales", scale, scale_ref)
    assert torch.equal(packed, packed_ref), _differing("bytes", packed, packed_ref)
    assert_unpacks(call, packed_ref, scale_ref, x.size(1))


def assert_unpacks(call: Call, packed: Tensor, scale: Tensor, num_columns: int) -> None:
    expected = fp8.unpack_e5m6(packed, scale, num_columns)
    assert_same_numbers(call("unpack_e5m6", packed, scale, num_columns), expected)
    in_bf16 = call("unpack_e5m6", packed, scale, num_columns, dtype=torch.bfloat16)
    assert torch.equal(in_bf16.nan_to_num(0.0), expected.bfloat16().nan_to_num(0.0))


def assert_message(call: Call, x: Tensor, eps: float) -> None:
    """Bytes, and the numbers that a receiver reads from them, bit for bit (NaN as NaN)."""
    message, expected = call("encode_message", x, eps), fp8.encode_message(x, eps)
    k = x.size(1)
    assert_same((message[:, :k].view(torch.float8_e4m3fn), message[:, k:].float()),
                (expected[:, :k].view(torch.float8_e4m3fn), expected[:, k:].float()))  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_numbers(
            call("decode_message", expected, k, dtype), fp8.decode_message(expected, k, dtype)
        )


def assert_dequantizes(call: Call, q: Tensor, scale: Tensor) -> None:
    expected = fp8.dequantize(q, scale)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_numbers(call("dequantize", q, scale, dtype), expected.to(dtype))


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places"
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[expected.dtype]
    bits, bits_ref = (t.nan_to_num(0.0).view(integers) for t in (actual, expected))
    assert torch.equal(bits, bits_ref), _differing("numbers", actual, expected)


def assert_gemm(call: Call, a: Quantized, b: Quantized, tensor_core_error: float = 0.0) -> None:
    """fp32 sums in another order: within K/32 + 8 roundings of Σ|a||b|, and twice that for what the reference rounds.

    `tensor_core_error`: what the hardware adds, as a share of Σ|a||b| (0 in the interpreter, which sums in fp32).
    """
    expected = fp8.gemm_nt(a, b)
    assert_sums_close(call("gemm_nt", a, b), expected, dequantize(*a), dequantize(*b), tensor_core_error)


def assert_grouped_gemm(
    call: Call, a: Quantized, b: Sequence[Quantized], sizes: Sequence[int], tensor_core_error: float = 0.0
) -> None:
    actual, expected = call("grouped_gemm_nt", a, b, sizes), fp8.grouped_gemm_nt(a, b, sizes)
    assert actual.shape == expected.shape
    rows = zip(actual.split(sizes), expected.split(sizes), dequantize(*a).split(sizes), b, strict=True)
    for part, part_ref, x, w in rows:
        assert_sums_close(part, part_ref, x, dequantize(*w), tensor_core_error)


def assert_sums_close(
    actual: Tensor, expected: Tensor, a: Tensor, b: Tensor, tensor_core_error: float
) -> None:
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    roundings = a.size(1) / 32 + 8
    bound = (3 * roundings * 2.0**-24 + tensor_core_error) * a.abs().matmul(b.abs().t())
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), "NaN in other places"
    assert bool(((actual - expected).abs() <= bound)[finite].all()), _differing("sums", actual, expected)


def assert_swiglu(call: Call, u: Tensor, weights: Tensor | None, pow2: bool) -> None:
    actual = call("swiglu_quantize_tile", u, weights, pow2=pow2)
    assert_nearly_same(actual, swiglu_reference.swiglu_quantize_tile(u, weights, pow2=pow2))


def assert_swiglu_backward(
    call: Call, grad: Tensor, u: Quantized, weights: Tensor | None, pow2: bool
) -> None:
    actual = call("swiglu_quantize_tile_backward", grad, u, weights, pow2=pow2)
    expected = swiglu_reference.swiglu_quantize_tile_backward(grad, u, weights, pow2=pow2)
    for name in ("grad_u", "grad_u_t", "hidden_t"):
        assert_nearly_same(getattr(actual, name), getattr(expected, name))
    if weights is None or expected.grad_weights is None:
        assert weights is actual.grad_weights is expected.grad_weights is None
        return
    finite = expected.grad_weights[expected.grad_weights.isfinite()].abs()
    atol = 1e-5 * float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(
        actual.grad_weights, expected.grad_weights, rtol=1e-5, atol=atol, equal_nan=True
    )


def assert_swiglu_cache(call: Call, u: Tensor, grad: Tensor, weights: Tensor | None) -> None:
    """What is kept bit for bit; what exp enters up to one step of bf16, or a few of fp32."""
    hidden, cache = call("swiglu_and_cache", u, weights)
    hidden_ref, cache_ref = fp8.swiglu_and_cache(u, weights)
    assert_same(cache, cache_ref)
    assert_one_rounding(hidden, hidden_ref)
    again = call("swiglu_from_cache", cache_ref, weights, dtype=u.dtype)
    assert_one_rounding(again, fp8.swiglu_from_cache(cache_ref, weights, dtype=u.dtype))
    grad_u, grad_weights = call("swiglu_gradients", grad, cache_ref, weights)
    grad_u_ref, grad_weights_ref = fp8.swiglu_gradients(grad, cache_ref, weights)
    # The derivative has terms of both signs, and so has the sum over columns: the bounds are of their absolute values.
    halves = cache_ref[0].size(0) * 2, cache_ref[0].size(1) // 2
    kept = fp8.dequantize(cache_ref[0].view(halves), cache_ref[1].view(halves[0], -1)).view(u.shape)
    weight = 1.0 if weights is None else weights
    terms = (kept.roll(halves[1], 1) * (grad.float() * weight).repeat(1, 2)).abs()
    assert_one_rounding(grad_u, grad_u_ref, terms.nan_to_num(0, 0, 0))
    if weights is None:
        assert grad_weights is grad_weights_ref is None
        return
    products = fp8.swiglu_from_cache(cache_ref, dtype=torch.float32).mul_(grad.float()).abs_()
    assert grad_weights_ref is not None
    finite = grad_weights_ref.isfinite()
    assert torch.equal(grad_weights.isfinite(), finite) and grad_weights.dtype == torch.float32
    bound = 1e-5 * products.sum(1, keepdim=True)
    assert bool(((grad_weights - grad_weights_ref).abs() <= bound)[finite].all())


def assert_one_rounding(actual: Tensor, expected: Tensor, terms: Tensor | float = 0.0) -> None:
    """Within 2⁻¹⁸, or in bf16 one step apart in at most 0.5 % of the elements; beside that 2⁻²⁰ of `terms`."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    a, b = actual.float(), expected.float()
    assert torch.equal(a.isnan(), b.isnan()), "NaN in other places"
    in_bf16 = expected.dtype == torch.bfloat16
    bound = b.abs() * (2.0**-7 if in_bf16 else 2.0**-18) + terms * 2.0**-20 + 2.0**-126
    finite = b.isfinite()
    assert torch.equal(a.isfinite(), finite)
    assert bool(((a - b).abs() <= bound)[finite].all()), _differing("numbers", actual, expected)
    if in_bf16:
        assert int((a != b)[finite].sum()) <= max(2, a.numel() // 200)


def assert_nearly_same(actual: Quantized, expected: Quantized) -> None:
    """exp is not rounded alike everywhere: numpy's, torch's and CUDA's `ex2.approx` differ by a few units in the last
    place of fp32. So scales agree within 2^-20, and a number that lay within that of a rounding boundary may get the
    neighbouring code: at most 0.2 % of them, each by one code of E4M3.
    """
    (q, scale), (q_ref, scale_ref) = actual, expected
    assert q.shape == q_ref.shape and scale.shape == scale_ref.shape
    torch.testing.assert_close(scale, scale_ref, rtol=2.0**-20, atol=0)
    nan, nan_ref = dequantize(q, scale).isnan(), dequantize(q_ref, scale_ref).isnan()
    assert torch.equal(nan, nan_ref), "NaN in other places"
    steps = (_ordered(q) - _ordered(q_ref))[~nan].abs()
    assert steps.numel() == 0 or int(steps.max()) <= 1, f"codes differ by up to {int(steps.max())}"
    assert int((steps != 0).sum()) <= max(1, steps.numel() // 500), f"{int((steps != 0).sum())} codes differ"


def _ordered(q: Tensor) -> Tensor:
    """E4M3 codes as integers in the order of their values; ±0 both 0."""
    code = q.view(torch.uint8).int()
    return torch.where(code < 128, code, 128 - code)


def _differing(what: str, actual: Tensor, expected: Tensor) -> str:
    places = (actual != expected).nonzero()[:3].tolist()
    values = [(actual[tuple(p)].item(), expected[tuple(p)].item()) for p in places]
    return f"{what} differ in {int((actual != expected).sum())} places: at {places} (kernel, reference) = {values}"
