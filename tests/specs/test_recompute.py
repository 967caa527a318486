"""Activation recompute changes no gradient, with immediate and with delayed weight gradients."""

from typing import Any

import pytest
import torch

from dsv3_megatron.specs.linear import num_pending_weight_grads, run_pending_weight_grads
from tests.specs.models import build, micro_config, random_batch

pytestmark = pytest.mark.usefixtures("single_rank")

# What DeepSeek-V3 recomputes (report §3.2.3), then everything that Megatron can outside the experts.
PUBLISHED = ["layernorm", "mla_up_proj"]
MORE = [*PUBLISHED, "core_attn", "mlp", "shared_experts"]


def gradients(modules: list[str] | None, delay: bool) -> dict[str, torch.Tensor]:
    recompute: dict[str, Any] = (
        {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
    )
    config = micro_config(num_layers=3, moe_layer_freq=[0, 1, 1], mtp_num_layers=1, **recompute)
    config.transformer.delay_wgrad_compute = delay
    model = build(config)
    losses = [model(**random_batch(seed=seed), attention_mask=None).mean() for seed in (0, 1)]
    for loss in losses:
        loss.backward()
    while num_pending_weight_grads(model):
        run_pending_weight_grads(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("modules", [PUBLISHED, MORE])
@pytest.mark.parametrize("delay", [False, True])
def test_recompute(modules: list[str], delay: bool) -> None:
    expected, got = gradients(None, False), gradients(modules, delay)
    for name, grad in expected.items():
        assert got[name] is not None, name
        assert (got[name] - grad).norm() <= 1e-5 * grad.norm(), name
