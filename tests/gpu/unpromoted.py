"""A product of E4M3 matrices that is never promoted: the control of the test that ours are."""

import torch
import triton
import triton.language as tl

from dsv3_megatron.fp8.kernels.launch import launch

BLOCK = 128


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] · b [N, K]ᵀ in fp32, K a multiple of 128, M and N of 128 or cut off there."""
    m, n, k = a.size(0), b.size(0), a.size(1)
    out = a.new_empty(m, n, dtype=torch.float32)
    grid = (triton.cdiv(m, BLOCK), triton.cdiv(n, BLOCK))
    launch(_kernel, grid, a, b, out, m, n, k, num_warps=8, num_stages=3, BLOCK=BLOCK)
    return out


@triton.jit
def _kernel(a_ptr, b_ptr, out_ptr, m, n, k, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK)
    a_at = a_ptr + tl.minimum(rows, m - 1)[:, None].to(tl.int64) * k + inner[None, :]
    b_at = b_ptr + tl.minimum(columns, n - 1)[:, None].to(tl.int64) * k + inner[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, BLOCK):
        a, b = tl.load(a_at + start), tl.load(b_at + start)
        total = tl.dot(a, tl.trans(b), total)  # in place: by default never promoted
    at = out_ptr + rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(at, total, mask=(rows[:, None] < m) & (columns[None, :] < n))
