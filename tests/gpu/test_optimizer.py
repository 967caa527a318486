"""Our AdamW against Transformer Engine's fused one: the same update, rounding and states."""

import importlib
from collections.abc import Callable

import pytest
import torch

from tests.gpu.device import DEVICE, REHEARSAL, needs_te

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_updates_and_states(moments: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    needs_te()
    from dsv3_megatron.optimizer import AdamW

    where = "dsv3_megatron.optimizer" if REHEARSAL else "transformer_engine.pytorch.optimizers"
    fused = getattr(importlib.import_module(where), "AdamW" if REHEARSAL else "FusedAdam")

    options = {
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "master_weights": True,
        "use_decoupled_grad": True,
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
    }
    start = torch.randn(4096, device=DEVICE).bfloat16()
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [AdamW([params[0]], **options), fused([params[1]], **options)]
    differ = 0.0
    for _ in range(20):
        grad = torch.randn(4096, device=DEVICE)
        for parameter, optimizer in zip(params, optimizers, strict=True):
            parameter.decoupled_grad = grad.clone()  # type: ignore[attr-defined]
            optimizer.step()
        ours, theirs = (o.state_dict()["state"][0] for o in optimizers)
        torch.testing.assert_close(ours["master_param"], theirs["master_param"], rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            rtol = 2**-7 if moments == torch.bfloat16 else 1e-5
            torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=1e-6)
            differ = max(differ, float((ours[name] != theirs[name]).double().mean()))
        optimizers[1].load_state_dict(optimizers[0].state_dict())  # and the states interchange
        params[1].data.copy_(params[0].data)
    record_property("largest_share_of_moments_that_differ", f"{differ:.2e}")
