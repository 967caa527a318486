"""Who computes, by features that are invented here; and the calls of `scaled_mm`, evaluated in plain PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron import fp8
from dsv3_megatron.fp8 import (
    dequantize,
    gemm_nt,
    kernels,
    products,
    quantize_block,
    quantize_tile,
    scaled_mm,
)
from dsv3_megatron.fp8.arithmetic import Features, arithmetic_for, choose_product, features_of
from dsv3_megatron.fp8.kernels.launch import recording
from dsv3_megatron.fp8.precision import RECIPES
from tests.fp8.test_tiles import matrix

PRODUCTS = [
    (1, 1, 1),
    (16, 128, 128),
    (130, 72, 300),
    (256, 384, 640),
    (40, 576, 1501),
    (0, 128, 256),
    (16, 16, 0),
]
H100 = Features(capability=(9, 0), triton=True, scaled_mm=True, cuda=(13, 0))


@pytest.mark.parametrize(
    "features, quantiser, product",
    [
        (H100, kernels, "scaled_mm"),
        (Features((9, 0), True, False, (12, 6)), kernels, "kernel"),  # torch 2.7
        (Features((9, 0), True, True, (12, 8)), kernels, "kernel"),  # cublasLt 12.8
        (Features((9, 0), False, True, (12, 9)), fp8, "scaled_mm"),
        (Features((10, 0), True, True, (13, 0)), kernels, "kernel"),  # Blackwell: cuBLASLt has other scales
        (Features((8, 9), True, True, (13, 0)), kernels, "kernel"),
        (Features((8, 0), True, True, (13, 0)), fp8, "emulation"),  # A100
        (Features((9, 0), False, False, (12, 6)), fp8, "emulation"),
        (Features(), fp8, "emulation"),
    ],
    ids=str,
)
def test_who_computes(features: Features, quantiser: Any, product: str) -> None:
    assert arithmetic_for(torch.ones(1), features) is quantiser
    assert choose_product(features, False, False) == choose_product(features, False, True) == product
    assert choose_product(features, True, False) == product
    # Two blocked operands are the study's: cuBLASLt has no such product, ours has.
    assert choose_product(features, True, True) == ("kernel" if quantiser is kernels else "emulation")


def test_features_of_this_machine() -> None:
    """On CPU nothing but plain PyTorch, whatever is installed."""
    assert features_of(torch.device("cpu")) == Features()
    assert arithmetic_for(torch.ones(1)) is fp8


def test_features_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked for is there in this torch: were it renamed, no GPU would use it, and nobody would be told."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = features_of.__wrapped__(torch.device("cuda"))
    assert found.triton and found.scaled_mm and found.cuda >= (12, 9) and found.block_scaled_mm
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    assert not features_of.__wrapped__(torch.device("cuda")).scaled_mm


def evaluated(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_recipe_a: Any,
    scale_b: Tensor,
    scale_recipe_b: Any,
    *,
    output_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """`torch.nn.functional.scaled_mm` in fp32, with the checks that torch's CUDA function makes of its operands."""
    (m, k), n = mat_a.shape, mat_b.size(1)
    assert (
        mat_a.dtype == mat_b.dtype == torch.float8_e4m3fn and scale_a.dtype == scale_b.dtype == torch.float32
    )
    assert mat_b.size(0) == k and not use_fast_accum
    if 0 in (m, n, k):
        return torch.zeros(m, n, dtype=output_dtype)
    assert mat_a.stride() == (k, 1), "row-major"
    assert mat_b.stride() == (1, k), "column-major"
    assert m % 16 == n % 16 == k % 16 == 0
    kinds = scale_recipe_a.name, scale_recipe_b.name
    assert kinds != ("BlockWise128x128", "BlockWise128x128"), "cuBLASLt has no such product"
    tiles = -(-k // 128)

    def expanded(kind: str, scale: Tensor, rows: int) -> Tensor:
        """[rows, K] factors."""
        if kind == "BlockWise1x128":
            assert scale.shape == (rows, tiles) and scale.stride(0) == 1
            assert scale.stride(1) == rows or (scale.size(1) == 1 and scale.stride(1) == 1)
            per_row = scale
        else:
            blocks, padded = -(-rows // 128), -(-tiles // 4) * 4
            assert kind == "BlockWise128x128" and scale.shape == (padded, blocks) and scale.stride(0) == 1
            assert scale.stride(1) == padded or (scale.size(1) == 1 and scale.stride(1) == 1)
            per_row = scale.t()[:, :tiles].repeat_interleave(128, 0)[:rows]
        return per_row.repeat_interleave(128, 1)[:, :k]

    a = mat_a.float() * expanded(kinds[0], scale_a, m)
    b = mat_b.t().float() * expanded(kinds[1], scale_b, n)
    return a.matmul(b.t()).to(output_dtype)


@pytest.fixture
def cublaslt(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """`scaled_mm` evaluated on CPU; the kinds of scales that it was called with."""
    calls: list[tuple[str, str]] = []

    def called(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args[3].name, args[5].name))
        return evaluated(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", called)
    return calls


@pytest.mark.parametrize("m, n, k", PRODUCTS, ids=str)
def test_calls_of_scaled_mm(cublaslt: list, m: int, n: int, k: int) -> None:
    """All three products of a Linear, of sizes that fill tiles and that do not, against the emulation."""
    a, b = matrix((m, k), seed=1), matrix((n, k), seed=2)
    for x, w in (
        (quantize_tile(a), quantize_block(b)),  # Fprop, Dgrad
        (quantize_tile(a, eps=0.0), quantize_tile(b)),  # Wgrad
        (quantize_block(a), quantize_tile(b)),  # Wgrad of dsv3_block_gradients
    ):
        for dtype in (torch.float32, torch.bfloat16):
            out = products.product(x, w, dtype, features=H100)
            expected = gemm_nt(x, w)
            assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
            # Sums in another order, and bf16's rounding.
            bound = 2.0**-20 * dequantize(*x).abs().matmul(dequantize(*w).abs().t())
            bound += expected.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0)
            assert bool(((out.float() - expected).abs() <= bound).all())
    kinds = {"BlockWise1x128", "BlockWise128x128"}
    assert len(cublaslt) == 6 and all(set(call) <= kinds for call in cublaslt)


def test_transposed_weight_is_laid_out_again(cublaslt: list) -> None:
    """Dgrad takes the weight's transpose, a view."""
    dy, (q, scale) = quantize_tile(matrix((32, 256), seed=1)), quantize_block(matrix((256, 384), seed=2))
    out = products.product(dy, (q.t(), scale.t()), features=H100)
    torch.testing.assert_close(out, gemm_nt(dy, (q.t(), scale.t())), rtol=1e-5, atol=1e-4)


def test_the_evaluation_is_strict() -> None:
    """The controls: a scale in another order, or without the rows of zeros, is refused or gives other numbers."""
    types = torch.nn.functional.ScalingType
    a, b = quantize_tile(matrix((128, 640), seed=1)), quantize_block(matrix((256, 640), seed=2))
    good = scaled_mm.arguments(a, b)
    options: dict[str, Any] = {"output_dtype": torch.float32, "use_fast_accum": False}
    recipes = getattr(types, good.scale_recipe_a), getattr(types, good.scale_recipe_b)

    def call(**changed: Any) -> Tensor:
        given = good._replace(scale_recipe_a=recipes[0], scale_recipe_b=recipes[1])._replace(**changed)
        return evaluated(*given, **options)

    expected = gemm_nt(a, b)
    torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-4)
    for wrong in (
        {"scale_a": a[1]},  # row-major
        {"scale_b": b[1].t()},  # five scales along K, not eight
        {"mat_b": b[0].t().contiguous()},
        {"scale_recipe_a": types.BlockWise128x128, "scale_recipe_b": types.BlockWise128x128},
    ):
        with pytest.raises(AssertionError):
            call(**wrong)
    shuffled = good.scale_a.flip(0).t().contiguous().t()
    assert not torch.allclose(call(scale_a=shuffled), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="no product of two matrices with a scale per 128×128"):
        scaled_mm.arguments(b, b)


def test_kernel_where_there_is_no_scaled_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    a = tuple(t.to("meta") for t in quantize_tile(matrix((32, 256))))
    with recording(launched.append):
        out = products.product(a, a, torch.bfloat16, features=Features((9, 0), True, False, (12, 6)))
    assert [launch.name for launch in launched] == ["gemm"] and out.dtype == torch.bfloat16


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_ask_for_what_is_there(cublaslt: list, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A recipe's own sums are never replaced by somebody else's: 14 bits without promotion stay the emulation's."""
    recipe = RECIPES[name]
    monkeypatch.setattr(products, "features_of", lambda device: H100)
    monkeypatch.setattr(products, "_kernel", lambda a, b, dtype: gemm_nt(a, b).to(dtype))  # tested elsewhere
    x, w, dy = matrix((32, 256), seed=1), matrix((384, 256), seed=2), matrix((32, 384), seed=3)
    q, scale = recipe.weight(w)
    pairs = (
        (recipe.activation(x), (q, scale)),
        (recipe.gradient(dy), (q.t(), scale.t())),
        (recipe.gradient(dy.t()), recipe.activation(x.t())),
    )
    for pair in pairs:
        expected = gemm_nt(*pair, recipe.accumulate, recipe.promote_every)
        torch.testing.assert_close(recipe.product(*pair), expected, rtol=1e-5, atol=1e-4)
    # Of three products, those that cuBLASLt computes.
    assert (
        len(cublaslt)
        == {"dsv3": 3, "dsv3_per_tensor": 0, "dsv3_block_gradients": 2, "dsv3_no_promotion": 0}[name]
    )
