"""FP8 on one GPU: Transformer Engine under `--fp8-recipe dsv3` against the reference backend's exact emulation.

The yardstick is the reference backend in fp32. Both compute in E4M3 by the same tiles, so TE's error may be at most a
few times the emulation's; outputs of single layers are nearer: they differ by bf16 rounding and the order of sums.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv3_megatron import fp8
from dsv3_megatron.fp8 import attention_output, difference
from dsv3_megatron.fp8.precision import FACTORIES
from tests.gpu.device import REHEARSAL, needs_te, sizes
from tests.gpu.test_backends import (  # noqa: F401  (fixture)
    BF16,
    SIZES,
    TE,
    distance,
    one_gpu,
    outputs_and_gradients,
)
from tests.specs.models import build, micro_config, random_batch

pytestmark = pytest.mark.gpu

EMULATED: dict[str, Any] = {"fp8_recipe": "dsv3"}
TE_FP8: dict[str, Any] = {
    "fp8": "e4m3",
    "fp8_recipe": "blockwise",
    "fp8_quantizer_factory": FACTORIES + "dsv3",
}
if REHEARSAL:  # the emulation stands in for TE
    TE_FP8 = EMULATED
FACTOR = 3.0


def test_model(one_gpu: None, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    needs_te()
    exact = outputs_and_gradients({})
    emulated = outputs_and_gradients(BF16 | EMULATED)
    te = outputs_and_gradients(BF16 | TE | TE_FP8)
    assert exact.keys() == emulated.keys() == te.keys()
    errors = {
        name: (distance(te[name], exact[name]), distance(emulated[name], exact[name])) for name in exact
    }
    worst = max(errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-12))
    record_property("loss_error_te", f"{errors['losses'][0]:.2e}")
    record_property("loss_error_emulated", f"{errors['losses'][1]:.2e}")
    record_property("worst", f"{worst}: TE {errors[worst][0]:.2e}, emulated {errors[worst][1]:.2e}")
    far = {name: pair for name, pair in errors.items() if pair[0] > FACTOR * max(pair[1], 2.0**-5)}
    assert not far, f"TE is more than {FACTOR}x as far from fp32 as the emulation: {far}"
    assert errors["losses"][0] > 1e-5, "TE did not compute in FP8"


def test_attention_output_is_kept_once(
    one_gpu: None,  # noqa: F811
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """E5M6 for the attention's output saves memory, so neither TE's attention nor the Linear keeps another copy."""

    def kept(in_e5m6: bool) -> int:
        """Bytes that a forward pass leaves behind."""
        overrides: dict[str, Any] = {**SIZES, **BF16, **TE, **TE_FP8}
        model = build(micro_config(**overrides)).cuda().bfloat16()
        if not in_e5m6:
            monkeypatch.setattr(attention_output, "keep_in_e5m6", lambda x, until: False)
        batch = {name: tensor.cuda() for name, tensor in random_batch(batch=2, seq=128).items()}
        before = torch.cuda.memory_allocated()
        losses = model(attention_mask=None, **batch)
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated()
        del losses
        return after - before

    needs_te()
    kept(True)  # once for what is allocated for good: workspaces, caches of the first call
    saved = kept(True), kept(False)
    record_property("bytes_kept", saved)
    numbers = 4 * 2 * 128 * 4 * 128  # layers, batch, sequence, heads, head size
    if REHEARSAL:  # whose stand-in counts no bytes
        assert saved == (0, 0)
        return
    assert saved[1] - saved[0] > 0.4 * numbers


@pytest.mark.parametrize(
    "tokens, size_in, size_out", sizes([(512, 7168, 2048), (1024, 2048, 7168)], [(16, 256, 128)])
)
def test_linear(
    one_gpu: None,  # noqa: F811
    record_property: Callable[[str, object], None],
    tokens: int,
    size_in: int,
    size_out: int,
) -> None:
    """One Linear of V3's sizes, all three products, TE's quantisers against the reference's."""
    needs_te()
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (
        torch.randn(shape, generator=generator).bfloat16().cuda()
        for shape in ((tokens, size_in), (size_out, size_in), (tokens, size_out))
    )
    got = by_reference(x, w, dy) if REHEARSAL else by_te(x, w, dy)
    for (name, found), expected in zip(got.items(), by_reference(x, w, dy).values(), strict=True):
        error = difference(found, expected)
        record_property(name, f"{error:.2e}")
        assert error < 1e-3, name


def by_te(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three products of TE's Linear under the recipe."""
    import transformer_engine.pytorch as te

    from dsv3_megatron.fp8 import te_recipe

    layer = te.Linear(x.size(1), w.size(0), bias=False, params_dtype=torch.bfloat16)
    layer.weight.data.copy_(w)
    x = x.detach().requires_grad_()
    with te.autocast(enabled=True, recipe=te_recipe.recipe_named("dsv3")):
        y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return {"Fprop": y, "Dgrad": x.grad, "Wgrad": layer.weight.grad}


def by_reference(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same with scales as TE's: powers of two, unless its own switch says fp32.

    The two kinds are 1.4e-3 apart by themselves, more than TE may be from the reference.
    """
    pow2 = os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0") != "1"
    q, scale = fp8.quantize_block(w, pow2=pow2)

    def tiles(operand: torch.Tensor, eps: float = 1e-4) -> Any:
        return fp8.quantize_tile(operand, eps=eps, pow2=pow2)

    return {
        "Fprop": fp8.gemm_nt(tiles(x), (q, scale)),
        "Dgrad": fp8.gemm_nt(tiles(dy, 0.0), (q.t(), scale.t())),
        "Wgrad": fp8.gemm_nt(tiles(dy.t(), 0.0), tiles(x.t())),
    }
