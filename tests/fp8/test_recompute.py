"""Activation recompute changes no gradient of an FP8 model, with immediate and with delayed weight gradients."""

from typing import Any

import pytest
import torch

from tests.specs.models import gradients_of, micro_config
from tests.specs.test_recompute import MORE, PUBLISHED

pytestmark = pytest.mark.usefixtures("single_rank")


def gradients(delay: bool, **recompute: Any) -> dict[str, torch.Tensor]:
    config = micro_config(
        mtp_num_layers=1, fp8_recipe="dsv3", params_dtype=torch.bfloat16, bf16=True, **recompute
    )
    return gradients_of(config, delay, seeds=(0,))


@pytest.mark.parametrize("delay", [False, True], ids=["", "delayed"])
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective", "recompute_modules": PUBLISHED},
        {"recompute_granularity": "selective", "recompute_modules": [*MORE, "moe"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
    ids=["published", "selective", "full"],
)
def test_bit_for_bit(recompute: dict[str, Any], delay: bool) -> None:
    expected, got = gradients(False), gradients(delay, **recompute)
    for name, grad in expected.items():
        assert got[name] is not None and torch.equal(got[name], grad), name
