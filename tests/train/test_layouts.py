"""The trainer's own code (batches, forward step, datasets) in every kind of layout: the loss is the same."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from tests.arguments.lines import MICRO
from tests.harness import run_distributed

EP = ["--expert-model-parallel-size", "2"]
PP = ["--pipeline-model-parallel-size", "2"]
# Megatron pads the vocabulary to a multiple of 128 × TP by default, and padding has its share of the softmax.
TP = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--make-vocab-size-divisible-by", "64"]
VPP = [*PP, "--num-virtual-stages-per-pipeline-rank", "2"]
DOCUMENTS = ["--dataloader-inter-document-masking"]


def train(rank: int, world_size: int, words: list[str]) -> tuple[float, float]:
    """Last main and MTP loss."""
    from dsv3_megatron import metrics
    from dsv3_megatron.train import main

    main(["--spec", "dsv3", "--device", "cpu", "--log-interval", "1", *MICRO, *words])
    return metrics.latest()["lm_loss"], metrics.latest()["mtp_loss"]


def losses(words: list[str], world_size: int = 4) -> tuple[float, float]:
    by_rank = run_distributed(train, world_size=world_size, timeout=200, init=False, words=words)
    assert len(set(by_rank)) == 1
    return by_rank[0]


@pytest.fixture(scope="module")
def reference() -> tuple[float, float]:
    """One process, no parallelism."""
    return losses([], world_size=1)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([*PP, *TP], id="tp2_pp2"),
        pytest.param([*EP, "--context-parallel-size", "2"], id="cp2_ep2"),
        pytest.param(
            [*EP, *VPP, "--use-distributed-optimizer", "--overlap-grad-reduce"],
            id="pp2_vpp2_ep2",
            marks=pytest.mark.slow,  # test_schedule_plans trains it in bf16
        ),
    ],
)
def test_layout_has_the_loss_of_one_process(reference, words):
    assert losses(words) == pytest.approx(reference, rel=1e-5)


def test_schedule_plans(reference):
    """Megatron's overlapped schedule asks the forward step for plans; bf16 is what it accepts."""
    words = [*EP, *VPP, "--bf16", "--use-distributed-optimizer"]
    plain = losses(words)
    overlapped = losses([*words, "--overlap-moe-expert-parallel-comm"])
    assert overlapped == pytest.approx(plain, rel=1e-4)
    assert plain == pytest.approx(reference, rel=1e-2)


def test_packed_documents_reach_the_model():
    """Boundaries arrive on middle stages too, so the loss differs from unmasked documents in the same way."""
    masked = losses([*PP, *EP, *DOCUMENTS])
    assert masked == pytest.approx(losses(DOCUMENTS, world_size=1), rel=1e-5)


def loss_of_ones(rank: int, world_size: int) -> Any:
    import torch
    from megatron.training import global_vars

    from dsv3_megatron.training.step import loss_func

    global_vars._GLOBAL_ARGS = SimpleNamespace(
        check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False
    )
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    per_token = torch.tensor([[0.5, 100.0], [1.5, 3.0]])
    loss, num_tokens, report = loss_func(mask, per_token)
    return loss.item(), num_tokens.item(), num_tokens.dtype == torch.int32, report["lm loss"].tolist()


def test_loss_is_the_masked_sum_and_its_count():
    (result,) = run_distributed(loss_of_ones, world_size=1)
    assert result == (5.0, 3, True, [5.0, 3.0])
    assert math.isfinite(result[0])
