"""Loss and every gradient of the spec-built model against transformers' DeepSeek-V3 on equal weights, fp32.

Row 11 of the known failures: order of the MTP projection's input, −inf masking of groups, the bias in the
    choice only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron.convert.hf_names import to_hf
from dsv3_megatron.specs.names import global_names, named_weights
from tests.specs.models import build, micro_config, random_batch
from tests.specs.reference_model import ReferenceModel, ReportGate

pytestmark = pytest.mark.usefixtures("single_rank")

MTP_WEIGHT = 0.3
# Larger than 0.006, so that attention and routing differ between tokens.
COMMON = {"init_method_std": 0.2, "moe_aux_loss_coeff": 0.0}
DENSE: dict[str, Any] = {
    "num_moe_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_load_balancing_type": "none",
}
YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CASES: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "moe": {"num_layers": 3, "moe_layer_freq": [0, 1, 1]},
    "no_groups": {"moe_router_num_groups": None, "moe_router_group_topk": None},
    "two_groups_of_four": {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk": 4},
    "shared_experts_2": {"moe_shared_expert_intermediate_size": 40},
    "q_lora_none": {"q_lora_rank": None},
    "yarn": YARN,
    "mtp": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": MTP_WEIGHT},
    "mtp_dense": {**DENSE, "mtp_num_layers": 1, "mtp_loss_scaling_factor": MTP_WEIGHT},
}


def compare(
    overrides: dict,
    folder: Path,
    change: Callable[[dict[str, Tensor]], None] = lambda weights: None,
    report_gate: bool = False,
    seq: int = 16,
) -> dict[str, float]:
    """Relative error of the loss and of each gradient, by name, of our model against the reference.

    Args:
        overrides: configuration.
        change: edits both models' weights in place, by global name.
        report_gate: see ReferenceModel.
    """
    config = micro_config(**COMMON | overrides)
    model = build(config)
    names = {local: global_name.name for local, global_name in global_names(model).items()}
    weights = {names[local]: tensor.detach() for local, tensor in named_weights(model).items()}
    generator = torch.Generator().manual_seed(5)
    for name, tensor in weights.items():
        if name.endswith("expert_bias"):
            tensor.normal_(0, 0.1, generator=generator)
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
    change(weights)
    reference = ReferenceModel(config.transformer, weights, folder, report_gate)
    batch = random_batch(seq=seq)

    # Megatron adds the gradients of MTP and balance loss in the backward pass; its loss is the main one
    # alone.
    loss = model(**batch, attention_mask=None).mean()
    loss.backward()
    expected, mtp_loss = reference(**batch)
    total = expected.mean()
    if mtp_loss is not None:
        total = total + MTP_WEIGHT * mtp_loss.mean()  # over all tokens of the sequence, report eq. 24
    for gate in reference.gates():
        total = total + config.transformer.moe_aux_loss_coeff * gate.balance_loss
    total.backward()

    errors = {"loss": abs(loss.item() - expected.mean().item()) / expected.mean().item()}
    released = reference.released_gradients()
    for local, parameter in model.named_parameters():
        parts = to_hf(names[local], config.transformer.num_layers)
        wanted = torch.cat([released.pop(part) for part in parts])
        assert parameter.grad is not None, f"{local} has no gradient"
        errors[names[local]] = float((parameter.grad - wanted).norm() / wanted.norm().clamp(min=1e-30))
    assert not released, f"parameters of the reference that we lack: {list(released)}"
    return errors


def worst(errors: dict[str, float]) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str, tmp_path: Path) -> None:
    errors = compare(CASES[case], tmp_path, seq=64 if case == "yarn" else 16)
    assert len(errors) > 20
    assert worst(errors)[0] <= 1e-5, worst(errors)


def all_negative(weights: dict[str, Tensor]) -> None:
    """Every biased score is negative, so that a mask of 0.0 would prefer the groups that are not kept."""
    for name, tensor in weights.items():
        if name.endswith("expert_bias"):
            tensor.sub_(3.0)


def all_tied(weights: dict[str, Tensor]) -> None:
    """All experts of a layer have the same score for every token, and the same bias."""
    for name, tensor in weights.items():
        if name.endswith("router.weight"):
            tensor.copy_(tensor[:1].expand_as(tensor))
        if name.endswith("expert_bias"):
            tensor.fill_(0.25)


def pairs_tied(weights: dict[str, Tensor]) -> None:
    """Experts 0 and 5, and 2 and 3, are equal: ties inside a group and between groups."""
    for name, tensor in weights.items():
        if name.endswith(("router.weight", "expert_bias")):
            tensor[5], tensor[3] = tensor[0].clone(), tensor[2].clone()


@pytest.mark.parametrize("change", [all_negative, all_tied, pairs_tied])
def test_adversarial_scores(change: Callable, tmp_path: Path) -> None:
    errors = compare({}, tmp_path, change, report_gate=True)
    assert worst(errors)[0] <= 1e-5, worst(errors)


def test_negative_scores_against_transformers_own_gate(tmp_path: Path) -> None:
    errors = compare({}, tmp_path, all_negative)
    assert worst(errors)[0] <= 1e-5, worst(errors)


def test_balance_loss_gradient(tmp_path: Path) -> None:
    overrides = {"moe_aux_loss_coeff": 0.5, "mtp_num_layers": 1, "mtp_loss_scaling_factor": MTP_WEIGHT}
    errors = compare(overrides, tmp_path, report_gate=True)
    assert worst(errors)[0] <= 1e-5, worst(errors)


def test_masking_with_zero_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReportGate, "mask", 0.0)
    assert worst(compare({}, tmp_path, all_negative, report_gate=True))[0] > 1e-2


def test_swapped_mtp_projection_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CASES["mtp"]
    original = ReferenceModel._load_mtp

    def swapped(self: ReferenceModel, tensors: dict[str, Tensor]) -> None:
        original(self, tensors)
        with torch.no_grad():
            weight = self.mtp.eh_proj.weight
            weight.copy_(weight.roll(weight.shape[1] // 2, 1))

    monkeypatch.setattr(ReferenceModel, "_load_mtp", swapped)
    assert worst(compare(config, tmp_path))[0] > 1e-2
