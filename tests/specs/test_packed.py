"""Packed sequences through the whole model equal the sequences one by one, losses and gradients."""

import itertools

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tests.specs.models import build, micro_config, random_batch

pytestmark = pytest.mark.usefixtures("single_rank")

BOUNDS = [0, 6, 7, 16]
YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rope", [{}, YARN], ids=["rope", "yarn"])
def test_packed_equals_separate(rope: dict) -> None:
    model = build(micro_config(init_method_std=0.2, moe_aux_loss_coeff=0.0, **rope))
    batch = random_batch(batch=1, seq=BOUNDS[-1])
    parts = [{name: x[:, a:b] for name, x in batch.items()} for a, b in itertools.pairwise(BOUNDS)]
    for part in parts:
        part["position_ids"] = part["position_ids"] - part["position_ids"][:, :1]
    batch["position_ids"] = torch.cat([part["position_ids"] for part in parts], 1)

    separate = torch.cat([model(**part, attention_mask=None) for part in parts], 1)
    expected = gradients(model, separate.sum())
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=9,
        max_seqlen_kv=9,
    )
    packed = model(**batch, attention_mask=None, packed_seq_params=packing)
    torch.testing.assert_close(packed, separate)
    for name, grad in gradients(model, packed.sum()).items():
        error, norm = (grad - expected[name]).norm(), expected[name].norm()
        assert error <= 1e-5 * norm + 1e-12, f"{name}: {error / norm}"

    unpacked = model(**batch, attention_mask=None)
    assert not torch.allclose(unpacked[:, BOUNDS[1] :], separate[:, BOUNDS[1] :], rtol=1e-3)
