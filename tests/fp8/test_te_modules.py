"""Transformer Engine's real modules under `--fp8-recipe dsv3`, forward and backward on CPU with its kernels replaced.

What is shown: TE's autograd functions save and restore what this project gives them, its gradients are right, and what
it keeps is what the policy table and the planner say. What is not: TE's kernels, which need a GPU.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron.backends.linear import num_pending_weight_grads, run_pending_weight_grads
from dsv3_megatron.fp8 import attention_output, swiglu_layer
from dsv3_megatron.fp8.precision import factory_of
from dsv3_megatron.metrics.flops import ModelSizes
from dsv3_megatron.plan import activations_te
from dsv3_megatron.plan.job import Job, Layout, Precision, Stage
from dsv3_megatron.specs.names import global_names
from tests.fp8 import te_kernels
from tests.fp8.kept import SIZES, Kept, assert_table, kept_by_module
from tests.specs.models import build, micro_config, random_batch

pytestmark = [
    pytest.mark.te,
    pytest.mark.usefixtures("single_rank"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None or os.environ.get("DSV3_TEST_TE") != "1",
        reason="needs Transformer Engine and DSV3_TEST_TE=1: `make test-te`",
    ),
]

TOKENS = 128
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
TE = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True, **BF16}
BLOCKWISE = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
DSV3 = {**BLOCKWISE, "fp8_quantizer_factory": factory_of("dsv3")}
# Megatron's fused SwiGLU is compiled on a GPU; here it is the same function, not compiled.
FUSED = {"bias_activation_fusion": True}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with te_kernels.standing_in():
        yield


def recompute(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)} if modules else {}


def model_of(overrides: dict[str, Any], delay: bool = False) -> Any:
    config = micro_config(**(SIZES | overrides))
    config.transformer.delay_wgrad_compute = delay
    return build(config).to(config.transformer.params_dtype)


def gradients(overrides: dict[str, Any], delay: bool = False, steps: int = 1) -> dict[str, Tensor]:
    """Losses, and every gradient by global name; `steps` microbatches in flight before the first backward pass."""
    model = model_of(overrides, delay)
    losses = [model(**random_batch(batch=1, seq=TOKENS, seed=s), attention_mask=None) for s in range(steps)]
    for loss in losses:
        loss.mean().backward()
    while num_pending_weight_grads(model):
        run_pending_weight_grads(model)
    names = global_names(model)
    found = {"losses": torch.stack(losses).detach().double()}
    for local, parameter in model.named_parameters():
        assert parameter.grad is not None, local
        found[names[local].name] = parameter.grad.double()
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def test_gradients_are_the_emulations() -> None:
    """Against the reference backend in fp32, TE may be a little further away than the reference backend in FP8.

    Both round by the same tiles: TE with scales of powers of two, and the operands of Wgrad once instead of twice.
    """
    exact, emulated = gradients({}), gradients(BF16 | {"fp8_recipe": "dsv3"})
    te = gradients(TE | DSV3)
    assert exact.keys() == emulated.keys() == te.keys() and len(te) > 60
    errors = {name: (distance(te[name], exact[name]), distance(emulated[name], exact[name])) for name in te}
    far = {name: pair for name, pair in errors.items() if pair[0] > 2 * max(pair[1], 2.0**-5)}
    assert not far
    assert errors["losses"][0] > 1e-5  # it did compute in FP8


def restored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given up and computed again takes its later values before anything could read the earlier ones."""

    def swiglu(hidden: Tensor, kept: Any, until: Tensor) -> None:
        q, scale, weights = kept.tensors
        again = swiglu_layer.arithmetic_for(q).swiglu_from_cache((q, scale), weights, dtype=hidden.dtype)
        hidden.untyped_storage().copy_(again.untyped_storage())

    def attention(x: Tensor, until: Tensor) -> bool:
        matrix = x.detach().reshape(-1, x.size(-1))
        arithmetic = attention_output.arithmetic_for(x)
        numbers = arithmetic.unpack_e5m6(*arithmetic.pack_e5m6(matrix), matrix.size(1), dtype=x.dtype)
        x.untyped_storage().copy_(numbers.untyped_storage())
        return True

    monkeypatch.setattr(swiglu_layer, "compute_again", swiglu)
    monkeypatch.setattr(attention_output, "keep_in_e5m6", attention)


@pytest.mark.parametrize("delay", [False, True], ids=["", "delayed"])
@pytest.mark.parametrize(
    "modules",
    [
        (),
        ("layernorm", "mla_up_proj"),
        ("layernorm", "mla_up_proj", "moe_act", "core_attn", "mlp", "shared_experts"),
    ],
    ids=["keep", "published", "more"],
)
def test_memory_given_up_is_there_again(
    modules: tuple[str, ...], delay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the gradients of modules that keep all of it, rounded, in bf16."""
    overrides = TE | DSV3 | recompute(*modules)
    found = gradients(overrides, delay, steps=2)
    with monkeypatch.context() as patch:
        restored_at_once(patch)
        expected = gradients(overrides, delay, steps=2)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
    if not modules and not delay:  # the control: unrounded, gradients are others
        with monkeypatch.context() as patch:
            patch.setattr(swiglu_layer, "compute_again", lambda *args, **kwargs: None)
            patch.setattr(attention_output, "keep_in_e5m6", lambda x, until: False)
            unrounded = gradients(overrides, steps=2)
        assert any("linear_fc2" in n and not torch.equal(unrounded[n], expected[n]) for n in expected)


def kept(overrides: dict[str, Any]) -> tuple[Any, dict[str, list[Kept]]]:
    model = model_of(TE | overrides)
    model.rows = []  # of the experts of each decoder layer, filled up to what FP8 products need
    for name, module in model.named_modules():
        if name.startswith("decoder.") and name.endswith(".experts.linear_fc1"):
            module.register_forward_hook(lambda m, args, output: model.rows.append(output[0].size(0)))
    batch = random_batch(batch=1, seq=TOKENS)
    model(**batch, attention_mask=None).mean().backward()  # weights in E4M3 and the like are made once
    model.zero_grad(set_to_none=True)
    return model, kept_by_module(model, lambda: model(**batch, attention_mask=None))


def test_policy() -> None:
    model, found = kept(DSV3)
    assert_table(model, found, "transformer_engine", TOKENS)


def block_of(name: str) -> str:
    """Block of the planner's list that a module's tensors belong to, "" for those that no list has."""
    for prefix, dense in (
        ("decoder.layers.0", True),
        ("decoder.layers.1", False),
        ("decoder.layers.2", False),
    ):
        if name.startswith(prefix + "."):
            rest = name[len(prefix) + 1 :]
            attends = rest.startswith(("self_attention", "input_layernorm"))
            return "attention" if attends else "dense" if dense else "moe"
    return ""


RESIDUALS = {  # made by a layer itself, of one size: what attention adds to, what the MLP adds to
    "decoder.layers.0": ("attention", "dense"),
    "decoder.layers.1": ("attention", "moe"),
    "decoder.layers.2": ("attention", "moe"),
}


@pytest.mark.parametrize(
    "modules",
    [
        (),
        ("layernorm", "mla_up_proj"),
        ("core_attn",),
        ("mlp",),
        ("shared_experts",),
        ("moe_act",),
    ],
    ids=lambda modules: "-".join(modules) or "keep",
)
@pytest.mark.parametrize("precision", ["dsv3", "blockwise", "bf16"])
def test_planner(precision: str, modules: tuple[str, ...]) -> None:
    """The planner's bytes of a dense and of two MoE layers against those that live after their forward pass."""
    fp8 = {"dsv3": DSV3, "blockwise": BLOCKWISE, "bf16": {}}[precision]
    model, found = kept(fp8 | FUSED | recompute(*modules))
    measured = {"attention": 0.0, "dense": 0.0, "moe": 0.0}
    for name, tensors in found.items():
        block = block_of(name)
        if block:
            measured[block] += sum(k.bytes for k in tensors) / TOKENS
    for name, receivers in RESIDUALS.items():
        for block, residual in zip(receivers, found[name], strict=True):
            measured[block] += residual.bytes / TOKENS
    config = model.config
    sizes = ModelSizes.from_config(config, 96, TOKENS)
    routed = config.moe_router_topk * TOKENS
    job = Job(
        sizes=sizes,
        layout=Layout(num_gpus=1),
        stages=(Stage(dense=1, moe=2),),
        global_batch_size=1,
        precision=Precision(
            compute=2, fp8=precision != "bf16", fp8_caches=precision == "dsv3", fp8_dispatch=False
        ),
        recompute=frozenset(modules),
        load_imbalance=sum(model.rows) / len(model.rows) / routed,
    )
    assert 1 <= job.load_imbalance < (1 if precision == "bf16" else 1.3) + 1e-9
    plan = activations_te.blocks(job, job.stages[0])
    attention, dense, moe = plan[0].size, plan[1].size, plan[3].size
    planned = {"attention": 3 * attention, "dense": dense, "moe": 2 * moe}
    errors = {name: planned[name] / TOKENS / measured[name] - 1 for name in planned}
    print(precision, modules, errors)
    assert all(abs(error) < 0.03 for error in errors.values()), (errors, found)
