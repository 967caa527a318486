"""FP8 layers against the same computation written out by hand: output and every gradient."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dsv3_megatron.backends.linear import num_pending_weight_grads
from dsv3_megatron.fp8.linear import (
    FP8AttentionOutput,
    FP8ColumnLinear,
    FP8DownProjection,
    FP8DuplicatedLinear,
    FP8RowLinear,
)
from dsv3_megatron.fp8.mlp import routed_experts
from tests.fp8 import by_hand

IN, OUT, TOKENS = 160, 200, (75, 2)  # more than one tile each way, and ragged
KINDS = {
    "column": FP8ColumnLinear,
    "row": FP8RowLinear,
    "duplicated": FP8DuplicatedLinear,
    "attention": FP8AttentionOutput,
    "down": FP8DownProjection,
}
DTYPES = [torch.float32, torch.bfloat16]


def config(dtype: torch.dtype = torch.float32, delay: bool = False, **fields: Any) -> TransformerConfig:
    settings = TransformerConfig(
        **{"num_layers": 1, "hidden_size": IN, "num_attention_heads": 4, "add_bias_linear": False, **fields},
        params_dtype=dtype,
        fp8_recipe="dsv3",  # type: ignore[arg-type]
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        gradient_accumulation_fusion=False,
    )
    settings.delay_wgrad_compute = delay  # the dataclass would insist on Transformer Engine
    return settings


def make(kind: str, settings: TransformerConfig, is_expert: bool = False) -> Any:
    options: dict[str, Any] = {"config": settings, "init_method": torch.nn.init.zeros_, "bias": False}
    if kind != "duplicated":
        options |= {"skip_bias_add": False, "is_expert": is_expert}
    if kind in ("row", "attention", "down"):
        options["input_is_parallel"] = True
    layer = KINDS[kind](IN, OUT, **options)
    layer.weight.data = normal(OUT, IN, seed=1).to(settings.params_dtype) * 0.1
    return layer


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(kind: str, dtype: torch.dtype, is_expert: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """Input, routing weights (an expert's down projection) and output gradient, as small as gradients are."""
    size = 2 * IN if kind == "down" else IN
    tokens = (TOKENS[0] * TOKENS[1],) if is_expert else TOKENS
    x = normal(*tokens, size, seed=2).to(dtype).requires_grad_()
    probs = normal(*tokens, seed=3).sigmoid().requires_grad_() if kind == "down" and is_expert else None
    return x, probs, normal(*tokens, OUT, seed=4).to(dtype) * 1e-8


def run(layer: Any, kind: str, x: Tensor, probs: Tensor | None, dy: Tensor, recompute: bool) -> Tensor:
    given = (x, probs) if kind == "down" else x
    if recompute:
        y = torch.utils.checkpoint.checkpoint(lambda: layer(given)[0], use_reentrant=False)
    else:
        y = layer(given)[0]
    y.backward(dy)
    return y


def expected(
    kind: str, layer: Any, x: Tensor, probs: Tensor | None, dy: Tensor, is_expert: bool
) -> by_hand.Result:
    x, dy = x.flatten(0, -2), dy.flatten(0, -2)
    if kind == "down":
        return by_hand.swiglu_linear(x, probs, layer.weight, dy, pow2_gradient=is_expert)
    cache = "e5m6" if kind == "attention" else "e4m3"
    return by_hand.linear(x, layer.weight, dy, cache, pow2_input=is_expert and kind == "column")


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype, kind: str = "") -> None:
    """fp32: rounding of sums. bf16: one rounding of the result. SwiGLU: fp32 against float64 in front of a quantiser,
    which takes another code where the two lie on either side of a midpoint."""
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-3 if kind == "down" else 2e-6
    difference = (got.detach().double().flatten() - wanted.flatten()).norm() / wanted.norm()
    assert difference <= bound, difference


@pytest.mark.usefixtures("single_rank")
class TestByHand:
    @pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
    @pytest.mark.parametrize("delay", [False, True], ids=["", "delayed"])
    @pytest.mark.parametrize(
        "kind, is_expert", [*((kind, False) for kind in KINDS), ("column", True), ("down", True)]
    )
    def test_gradients(
        self, kind: str, is_expert: bool, delay: bool, dtype: torch.dtype, recompute: bool
    ) -> None:
        layer = make(kind, config(dtype, delay), is_expert)
        # As Megatron's DDP: an fp32 buffer that weight gradients are added to.
        layer.weight.main_grad = torch.full((OUT, IN), 1e-8)
        layer.weight.grad_added_to_main_grad = False
        layer.register_wgrad_accumulation_and_reduce_hooks(lambda: setattr(layer.weight, "grad", None))
        x, probs, dy = operands(kind, dtype, is_expert)
        y = run(layer, kind, x, probs, dy, recompute)
        wanted = expected(kind, layer, x, probs, dy, is_expert)
        assert y.dtype == x.grad.dtype == dtype
        assert_near(y, wanted.y, dtype, kind)
        assert_near(x.grad, wanted.dx, dtype, kind)
        if probs is not None:
            assert_near(probs.grad, wanted.dprobs, torch.float32, kind)
        if delay:
            assert num_pending_weight_grads(layer) == 1 and (layer.weight.main_grad == 1e-8).all()
            layer.backward_dw()
        assert layer.weight.grad_added_to_main_grad
        assert layer.weight.main_grad.dtype == torch.float32
        assert_near(layer.weight.main_grad - 1e-8, wanted.dw, torch.float32, kind)

    def test_what_is_cached(self) -> None:
        """Between forward and backward a layer holds bytes: E4M3, or E5M6 packed, and their scales."""
        sizes = {}
        for kind in KINDS:
            x, probs, _ = operands(kind, torch.bfloat16)
            saved: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=saved: kept.append(t) or t, lambda t: t
            ):
                make(kind, config(torch.bfloat16))((x, probs) if kind == "down" else x)
            kept = [t for t in saved if t is not None]
            assert kept[0].element_size() == 1 and kept[1].dtype == torch.float32
            sizes[kind] = kept[0].numel() / x.numel()
            assert sum(t.numel() * t.element_size() for t in kept) < 1.56 * x.numel()
        assert sizes == {"column": 1, "row": 1, "duplicated": 1, "attention": 1.5, "down": 1}

    @pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
    @pytest.mark.parametrize("tokens", [(140, 0, 3, 0), (0, 0, 0, 0), (1, 129, 0, 256)])
    def test_experts(self, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
        """Four experts, some without a token: output and gradients finite and as by hand, weight gradients zero."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = ProcessGroupCollection.use_mpu_process_groups()
        settings = config(
            dtype, num_moe_experts=4, moe_ffn_hidden_size=144, moe_token_dispatcher_type="alltoall"
        )
        experts = routed_experts()(4, settings, pg_collection=groups)
        for parameter in experts.parameters():
            parameter.main_grad = torch.zeros(parameter.shape)
        rows = sum(tokens)
        x, dy = (normal(rows, IN, seed=seed).to(dtype) for seed in (2, 3))
        x.requires_grad_()
        probs = normal(rows, seed=4).sigmoid().requires_grad_()
        y, _ = experts(x, torch.tensor(tokens), probs)
        y.backward(dy)
        assert y.isfinite().all() and x.grad.isfinite().all()
        parts = zip(x.split(tokens), probs.split(tokens), dy.split(tokens), strict=True)
        start = 0
        for expert, (x_e, probs_e, dy_e) in zip(experts.local_experts, parts, strict=True):
            rows_e = slice(start, start + len(x_e))
            start += len(x_e)
            w1, w2 = expert.linear_fc1.weight, expert.linear_fc2.weight
            if not len(x_e):
                assert not w1.main_grad.any() and not w2.main_grad.any()
                continue
            u = by_hand.linear(x_e, w1, torch.zeros(len(x_e), len(w1)), pow2_input=True).y.to(dtype)
            down = by_hand.swiglu_linear(u, probs_e, w2, dy_e, pow2_gradient=True)
            up = by_hand.linear(x_e, w1, down.dx.to(dtype), pow2_input=True)
            pairs: list[tuple[Any, Any]] = [
                (y[rows_e], down.y),
                (x.grad[rows_e], up.dx),
                (probs.grad[rows_e], down.dprobs),
                (w1.main_grad, up.dw),
                (w2.main_grad, down.dw),
            ]
            for got, wanted in pairs:
                # u and its gradient are rounded (to bf16) before they are quantised: another code at midpoints.
                difference = (got.double() - wanted).norm() / wanted.norm()
                assert difference <= (2e-3 if dtype == torch.float32 else 1e-2), difference

    def test_frozen_weight(self) -> None:
        layer = make("column", config())
        layer.weight.requires_grad_(False)
        x, _, dy = operands("column", torch.float32)
        layer(x)[0].backward(dy)
        assert_near(x.grad, expected("column", layer, x, None, dy, False).dx, torch.float32)
