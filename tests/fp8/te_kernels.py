"""Transformer Engine's kernels in plain PyTorch, so that TE's own modules run on CPU: forward, saving, backward.

What is real: TE's modules, their autograd functions with all that they save and free, its quantizers and quantised
tensors. What stands in: the C++ functions that those call, with the layouts of TE 2.20, computed by
`dsv3_megatron.fp8`; and attention, whose fused kernels keep queries, keys, values, the output and fp32 row sums.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dsv3_megatron import fp8


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """By 1×128 with the transpose by 1×128 beside it (what TE calls columnwise), or by 128×128 and its transpose."""
    x = tensor.detach().reshape(-1, tensor.size(-1))
    by_block = quantizer.block_scaling_dim == 2
    options: dict[str, Any] = {"eps": quantizer.amax_epsilon, "pow2": quantizer.force_pow_2_scales}
    result = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    result = result if output is None else output
    for wanted, matrix, name in (
        (quantizer.rowwise_usage, x, "_rowwise"),
        (quantizer.columnwise_usage, x.t(), "_columnwise"),
    ):
        if wanted:
            q, scale = (fp8.quantize_block if by_block else fp8.quantize_tile)(matrix, **options)
            data, scales = getattr(result, f"{name}_data"), getattr(result, f"{name}_scale_inv")
            data.copy_(q.view(torch.uint8).view(data.shape))
            scales.zero_()
            scale = scale if by_block else scale.t()
            scales[: scale.size(0), : scale.size(1)] = scale
    return result


def split_quantize(
    tensor: Tensor, split_sections: Sequence[int], quantizer_list: Sequence[Any], *unused: Any, **also: Any
) -> list[Any]:
    parts = tensor.split(list(split_sections))
    return [quantize(part, quantizer) for part, quantizer in zip(parts, quantizer_list, strict=True)]


def plain(operand: Any) -> Tensor:
    """The matrix that an operand stands for, fp32."""
    if isinstance(operand, Tensor) and not hasattr(operand, "_rowwise_data"):
        return operand.detach().float().reshape(-1, operand.size(-1))
    rowwise = operand._rowwise_data is not None
    name = "_rowwise" if rowwise else "_columnwise"
    data, scales = getattr(operand, f"{name}_data"), getattr(operand, f"{name}_scale_inv")
    q = data.reshape((-1, data.size(-1)) if rowwise else (data.size(0), -1)).view(torch.float8_e4m3fn)
    tiles = -(-q.size(1) // 128)
    if operand._is_2D_scaled:
        scale = scales[: -(-q.size(0) // 128), :tiles]
    else:
        scale = scales[:tiles, : q.size(0)].t()
    values = fp8.dequantize(q, scale.contiguous())
    return values if rowwise else values.t()


def gemm(a: Any, trans_a: bool, b: Any, trans_b: bool) -> Tensor:
    left, right = plain(b), plain(a)
    return (left.t() if trans_b else left) @ (right.t() if trans_a else right)


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    *rest: Any,
    **more: Any,
) -> list[Any]:
    product = gemm(A, transA, B, transB)
    accumulate = rest[7]
    if D is not None:
        D.copy_((D.float() + product if accumulate else product).view(D.shape))
        return [D, None, None, None]
    constants = importlib.import_module("transformer_engine.pytorch.constants")
    dtype = {int(te): torch_dtype for torch_dtype, te in constants.TE_DType.items()}[int(output_dtype)]
    source = B if isinstance(B, Tensor) else None
    shape = product.shape if source is None or transB else (*source.shape[:-1], product.size(1))
    return [product.to(dtype).view(shape), None, None, None]


def grouped_gemm(
    A: Any, trans_a: bool, B: Any, trans_b: bool, out: list[Tensor], dtype: Any, m_splits: Sequence[int], *rest: Any
) -> Any:  # fmt: skip
    single_output, accumulate = rest[2], rest[7]
    outputs = list(out[0].split(list(m_splits))) if single_output else out
    for a, b, result in zip(A, B, outputs, strict=True):
        product = gemm(a, trans_a, b, trans_b)
        result.copy_(result.float() + product if accumulate else product)
    return rest[0]  # biases, which there are none of


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any, *unused: Any
) -> list[Any]:
    x = input.detach().float()
    rsigma = (x.square().mean(-1) + eps).rsqrt()
    y = (x * rsigma[:, None] * weight.detach().float()).to(input.dtype)
    if quantizer is not None:
        y = quantize(y, quantizer, ln_out)
    elif ln_out is not None:
        y = ln_out.copy_(y)
    return [y, None, rsigma]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered: bool
) -> list[Tensor]:
    normed, grad = x.float() * rsigma[:, None], dz.float().view(x.shape)
    scaled = grad * gamma.float()
    dx = rsigma[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (grad * normed).sum(0).to(gamma.dtype)]


def padding(source: Tensor, target: Tensor, rows: Sequence[int], target_rows: Sequence[int]) -> None:
    """Fill up each part with zeros, or cut it."""
    target.zero_()
    for part, filled in zip(source.split(list(rows)), target.split(list(target_rows)), strict=True):
        count = min(len(part), len(filled))
        filled[:count] = part[:count]


class FusedAttention(torch.autograd.Function):
    """q, k [s, b, n, d], v [s, b, n, d_v] → [s, b, n·d_v]; keeps what the fused kernels keep."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        scores = _scores(q, k, scale)
        out = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), v.float()).to(v.dtype).flatten(2)
        ctx.save_for_backward(q, k, v, out, scores.logsumexp(-1))
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        grad_out, out = (x.view(*v.shape).float() for x in (grad, out))
        probs = (_scores(q, k, ctx.scale) - sums[..., None]).exp()
        row = torch.einsum("sbnd,sbnd->bns", grad_out, out)
        grad_scores = (
            probs * (torch.einsum("sbnd,tbnd->bnst", grad_out, v.float()) - row[..., None]) * ctx.scale
        )
        grads = (
            torch.einsum("bnst,tbnd->sbnd", grad_scores, k.float()),
            torch.einsum("bnst,sbnd->tbnd", grad_scores, q.float()),
            torch.einsum("bnst,sbnd->tbnd", probs, grad_out),
        )
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("sbnd,tbnd->bnst", q.float(), k.float()) * scale
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))


def attention(self: Any, q: Tensor, k: Tensor, v: Tensor, *unused: Any, **also: Any) -> Tensor:
    """In place of `TEDotProductAttention.forward`."""
    return FusedAttention.apply(q, k, v, self.softmax_scale)


@contextmanager
def standing_in() -> Iterator[None]:
    """Within, TE's modules run on CPU; needs `dsv3_megatron.cpu.activate(allow_te=True)`."""
    tex = importlib.import_module("transformer_engine_torch")
    gemms = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    functions: dict[str, Any] = {
        "quantize": quantize,
        "split_quantize": split_quantize,
        "generic_gemm": generic_gemm,
        "te_general_grouped_gemm": grouped_gemm,
        "rmsnorm_fwd": rmsnorm_fwd,
        "rmsnorm_bwd": rmsnorm_bwd,
        "fp8_transpose": lambda data, dtype, out=None: data.reshape(-1, data.size(-1)).t().contiguous(),
        "fused_multi_row_padding": padding,
        "fused_multi_row_unpadding": padding,
    }

    def workspace(device: Any, ub: bool, grouped_gemm: bool) -> Any:
        return [torch.empty(16, dtype=torch.uint8)] if grouped_gemm else torch.empty(16, dtype=torch.uint8)

    with ExitStack() as stack:
        for name, function in functions.items():
            real = getattr(tex, name)
            for module in [m for n, m in sys.modules.items() if n.startswith("transformer_engine")]:
                if vars(module).get(name) is real:
                    stack.enter_context(mock.patch.object(module, name, function))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True, create=True))
        stack.enter_context(mock.patch.object(gemms, "get_cublas_workspace", workspace))
        stack.enter_context(mock.patch.object(extension.TEDotProductAttention, "forward", attention))
        yield
