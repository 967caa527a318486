"""Activation recompute changes no gradient, with immediate and with delayed weight gradients."""

from typing import Any

import pytest
import torch

from tests.specs.models import gradients_of, micro_config

pytestmark = pytest.mark.usefixtures("single_rank")

# What DeepSeek-V3 recomputes (report §3.2.3), then everything that Megatron can outside the experts.
PUBLISHED = ["layernorm", "mla_up_proj"]
MORE = [*PUBLISHED, "core_attn", "mlp", "shared_experts"]


def gradients(modules: list[str] | None, delay: bool) -> dict[str, torch.Tensor]:
    recompute: dict[str, Any] = (
        {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
    )
    config = micro_config(num_layers=3, moe_layer_freq=[0, 1, 1], mtp_num_layers=1, **recompute)
    return gradients_of(config, delay)


@pytest.mark.parametrize("modules", [PUBLISHED, MORE])
@pytest.mark.parametrize("delay", [False, True])
def test_recompute(modules: list[str], delay: bool) -> None:
    expected, got = gradients(None, False), gradients(modules, delay)
    for name, grad in expected.items():
        assert got[name] is not None, name
        assert (got[name] - grad).norm() <= 1e-5 * grad.norm(), name
