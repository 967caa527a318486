"""The held-out loss of the pipeline: against the model's own logits, and the same for every layout."""

import numpy as np
import pytest

from dsv3_megatron.demo.heldout import Windows, ordered_windows, shuffled_windows
from tests.harness import run_distributed

SEQ_LENGTH, VOCAB_SIZE = 16, 128
EP = "expert_model_parallel_size={}"


def windows() -> tuple[Windows, Windows]:
    """Ordered and shuffled windows, the ordered ones with an uneven mask."""
    stream = np.random.default_rng(0).integers(0, VOCAB_SIZE, size=500)
    ordered = ordered_windows(stream, 8, SEQ_LENGTH)
    shuffled = shuffled_windows(ordered, seed=1)
    ordered.loss_mask[:] = np.random.default_rng(1).random(ordered.loss_mask.shape) < 0.7
    ordered.loss_mask[3] = 0  # a window, thus a share of a rank, without targets
    return ordered, shuffled


def evaluated(
    rank: int, world_size: int, layout: str, schedule: str = "1f1b", more: list[str] | None = None
) -> dict:
    """Train one step; then the losses by `mean_loss`, and, where the whole model is here, from its logits."""
    import torch

    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv
    from dsv3_megatron.demo.evaluate import mean_loss

    found: dict = {}

    def evaluate(model):
        if found:
            return
        found["mean_loss"] = [mean_loss(model, w) for w in windows()]
        if world_size == 1:
            found["from_logits"] = [from_logits(model[0], w) for w in windows()]

    def from_logits(model, w: Windows) -> float:
        tokens, labels, mask = (torch.from_numpy(x) for x in (w.tokens, w.labels, w.loss_mask))
        positions = torch.arange(SEQ_LENGTH).expand_as(tokens)
        logits = model(tokens, positions, None)[..., :VOCAB_SIZE]  # without the padding of the vocabulary
        logits = logits.double()
        loss = torch.logsumexp(logits, -1) - logits.gather(-1, labels[..., None])[..., 0]
        return float((loss * mask).sum() / mask.sum())

    overrides = [
        "model=micro",
        f"layout={layout}",
        f"schedule={schedule}",
        "device=cpu",
        "train_iters=1",
        "eval_interval=1",
        "eval_iters=1",
    ]
    overrides += [
        f"seq_length={SEQ_LENGTH}",
        f"max_position_embeddings={SEQ_LENGTH}",
        f"vocab_size={VOCAB_SIZE - 1}",
    ]
    overrides += ["micro_batch_size=1", "global_batch_size=8", "make_vocab_size_divisible_by=128"]
    overrides += more or []
    train.main(to_argv(compose(overrides)), non_loss_data_func=evaluate)
    return found


@pytest.fixture(scope="module")
def single() -> dict:
    """The losses in one process."""
    return run_distributed(evaluated, world_size=1, init=False, layout="cpu_single")[0]


def test_losses_are_those_of_the_logits_in_every_layout(single):
    assert single["mean_loss"] == pytest.approx(single["from_logits"], rel=1e-5)
    assert single["mean_loss"][0] != pytest.approx(single["mean_loss"][1], rel=2e-4)

    ranks = run_distributed(evaluated, world_size=4, init=False, layout="cpu_pp2_ep2")
    assert [found["mean_loss"] for found in ranks[:2]] == [[None, None]] * 2  # the first pipeline stage
    for found in ranks[2:]:
        assert found["mean_loss"] == pytest.approx(single["mean_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "schedule, ep",
    [
        ("dualpipe", 1),
        pytest.param("dualpipe", 2, marks=pytest.mark.slow),
        pytest.param("dualpipev", 2, marks=pytest.mark.slow),
    ],
)
def test_a_schedule_of_two_stages_per_rank_evaluates_the_same(schedule: str, ep: int, single: dict) -> None:
    layout, world_size = "cpu_pp2_ep2", 2 * ep
    ranks = run_distributed(
        evaluated, world_size=world_size, init=False, layout=layout, schedule=schedule, more=[EP.format(ep)]
    )
    for found in ranks:  # every rank is told
        assert found["mean_loss"] == pytest.approx(single["mean_loss"], rel=1e-4)
