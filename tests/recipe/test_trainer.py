"""The real trainer follows the schedules, step by step, also after a resume; under a pipeline schedule too."""

import pytest

from dsv3_megatron.recipe.schedules import Schedules
from tests.harness import run_distributed
from tests.recipe import recorded

SAMPLES, BATCH = 360, (2, 4, 1)


def run(words: list[str], world_size: int = 1) -> list[dict]:
    return run_distributed(recorded.train, world_size=world_size, timeout=900, init=False, words=words)[0]


def assert_follows(
    records: list[dict], samples: int, batch: tuple[int, int, int], to_the_end: bool = True
) -> None:
    start, end, increment = batch
    schedules = Schedules(
        train_tokens=samples * recorded.SEQ,
        seq_length=recorded.SEQ,
        lr=1e-3,
        min_lr=1e-4,
        last_lr=1e-3 * 7.3e-6 / 2.2e-4,
        batch_size=end,
        batch_ramp=(start, increment),
    )
    consumed = records[0]["samples"]
    for step in records:
        expected = schedules.at(consumed * recorded.SEQ)
        assert step["samples"] == consumed
        assert step["lr"] == pytest.approx(expected["lr"], rel=1e-12)
        assert [step[k] for k in ("batch", "gamma", "mtp_weight")] == [
            expected[k] for k in ("batch", "gamma", "mtp_weight")
        ]
        assert step["forwards"] == step["batch"]  # micro batch 1; a mirrored rank runs both directions
        consumed += step["batch"]
    if to_the_end:
        assert samples <= consumed < samples + end


def test_every_step_and_a_resume_inside_the_ramp(tmp_path) -> None:
    """Megatron saves by itself where the batch grows; the resumed steps are the straight run's."""
    straight = run(recorded.words(SAMPLES, BATCH, "--save", str(tmp_path), "--save-interval", "1000"))
    assert_follows(straight, SAMPLES, BATCH)
    assert {step["batch"] for step in straight} == {2, 3, 4}
    lrs = [step["lr"] for step in straight]
    # Constant, cosine, and both tails; the warm-up is less than a sample here.
    assert lrs.count(1e-3) > 20 and len(set(lrs)) > 20 and lrs.count(1e-4) >= 1 and lrs[-1] < 1e-4
    assert (straight[0]["gamma"], straight[-1]["gamma"]) == (1e-3, 0.0)
    assert (straight[0]["mtp_weight"], straight[-1]["mtp_weight"]) == (0.3, 0.1)
    load = ["--load", str(tmp_path), "--ckpt-step", "3"]
    assert run(recorded.words(SAMPLES, BATCH, *load, "--exit-interval", "12")) == straight[3:12]


@pytest.mark.slow
def test_a_resume_inside_each_later_phase(tmp_path) -> None:
    straight = run(recorded.words(SAMPLES, BATCH, "--save", str(tmp_path), "--save-interval", "8"))
    for step in (32, 72, 88):  # constant, cosine, first tail
        resumed = run(recorded.words(SAMPLES, BATCH, "--load", str(tmp_path), "--ckpt-step", str(step)))
        assert resumed == straight[step:]


def test_under_dualpipe() -> None:
    """Two pipeline ranks, mirrored: every batch of the ramp is split over both directions."""
    pipeline = ["--pipeline-schedule", "dualpipe", "--pipeline-model-parallel-size", "2"]
    records = run(recorded.words(300, (4, 10, 2), *pipeline, "--exit-interval", "4"), 2)
    assert_follows(records, 300, (4, 10, 2), to_the_end=False)
    assert [step["batch"] for step in records] == [4, 6, 10, 10]
