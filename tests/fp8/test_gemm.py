"""Products of quantised matrices against float64, and the error of an accumulator of 14 bits."""

import pytest
import torch

from dsv3_megatron.fp8 import (
    difference,
    gemm_nt,
    grouped_gemm_nt,
    quantize_block,
    quantize_tile,
)
from dsv3_megatron.studies.accumulation import largest_error


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_intervals(a, b) -> torch.Tensor:
    """Σ over intervals of 128: the product of the codes, times both scales, in float64."""
    (qa, sa), (qb, sb) = a, b
    total = torch.zeros(qa.size(0), qb.size(0), dtype=torch.float64)
    for i in range(sa.size(1)):
        columns = slice(128 * i, 128 * (i + 1))
        rows_a = (
            sa[:, i].double().repeat_interleave(128)[: len(qa)] if len(sa) != len(qa) else sa[:, i].double()
        )
        rows_b = (
            sb[:, i].double().repeat_interleave(128)[: len(qb)] if len(sb) != len(qb) else sb[:, i].double()
        )
        total += (qa[:, columns].double() @ qb[:, columns].double().t()) * rows_a[:, None] * rows_b
    return total


@pytest.mark.parametrize("quantize_b", [quantize_block, quantize_tile])
@pytest.mark.parametrize(
    "m, n, k", [(1, 1, 1), (5, 130, 128), (200, 3, 300), (64, 64, 1024), (0, 4, 128), (4, 4, 0)]
)
def test_scales_are_applied_every_128(m: int, n: int, k: int, quantize_b) -> None:
    a, b = quantize_tile(normal(m, k)), quantize_b(normal(n, k, seed=1))
    exact = by_intervals(a, b)
    for product, bound in ((gemm_nt(a, b), 1e-6), (gemm_nt(a, b, "h800"), 1e-3)):
        assert product.dtype == torch.float32 and product.shape == (m, n)
        assert (product - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("k", [128, 1000, 4096])
def test_similar_to_unquantised(k: int) -> None:
    x, w = normal(96, k), normal(160, k, seed=1)
    product = gemm_nt(quantize_tile(x), quantize_block(w))
    assert 1e-5 < difference(product, x @ w.t()) < 1e-3


def test_difference() -> None:
    x = normal(3, 4)
    assert difference(x, x) == pytest.approx(0, abs=1e-12) and difference(torch.zeros(2), torch.zeros(2)) == 0
    assert difference(x, -x) == pytest.approx(2)


class TestAccumulatorOf14Bits:
    """The report: nearly 2 % of error at K = 4096, cured by promotion every 128 (§3.3.2)."""

    def test_report(self) -> None:
        assert 0.01 < largest_error(4096, None) < 0.03
        assert largest_error(4096, 128) < 0.001

    def test_grows_with_the_interval(self) -> None:
        errors = [largest_error(4096, interval) for interval in (128, 512, 2048, None)]
        assert errors == sorted(errors) and errors[-1] > 8 * errors[0]

    def test_one_step_by_hand(self) -> None:
        """4097 needs 13 bits, 2^14 + 1 needs 15: the last bit is cut, whatever the sign."""
        one = torch.ones(1, 1)
        for value, kept in ((4097.0, 4097.0), (16385.0, 16384.0), (-16385.0, -16384.0)):
            high = torch.tensor([[448.0]]).to(torch.float8_e4m3fn), torch.tensor([[value / 448]])
            product = gemm_nt(high, (one.to(torch.float8_e4m3fn), one), "h800")
            assert product.item() == pytest.approx(kept, abs=0.01)


def test_grouped_is_expert_by_expert() -> None:
    sizes = [3, 0, 130, 1]
    x, weights = normal(134, 200), [normal(70, 200, seed=e + 1) for e in range(4)]
    blocks = [quantize_block(w) for w in weights]
    product = grouped_gemm_nt(quantize_tile(x), blocks, sizes)
    expected = torch.cat([gemm_nt(quantize_tile(p), b) for p, b in zip(x.split(sizes), blocks, strict=True)])
    assert torch.equal(product, expected) and product.shape == (134, 70)


def test_errors() -> None:
    a, b = quantize_tile(normal(2, 200)), quantize_block(normal(3, 200))
    with pytest.raises(ValueError, match="accumulate='fp16'"):
        gemm_nt(a, b, "fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="promote_every=100: use a multiple of 128"):
        gemm_nt(a, b, "h800", 100)
    with pytest.raises(ValueError, match="inner dimensions differ"):
        gemm_nt(a, quantize_block(normal(3, 201)))
    with pytest.raises(ValueError, match="b's scale has 3 columns"):
        gemm_nt(a, (b[0], torch.ones(3, 3)))
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_gemm_nt(a, [b, b], [1, 2])
