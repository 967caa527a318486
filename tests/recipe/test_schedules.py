"""The published schedules at their borders, any budget, and the staircase of the batch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.recipe.ramp import BatchRamp
from dsv3_megatron.recipe.schedules import Schedules

V3 = Schedules()

# tokens: (learning rate, batch, γ, λ), from deepseek-v3.md §2, worked out by hand.
GOLDEN = {
    0: (0.0, 3072, 1e-3, 0.3),
    1000 * 3072 * 4096: (1.1e-4, 3072, 1e-3, 0.3),  # half of the 2000 steps
    2000 * 3072 * 4096: (2.2e-4, 3072, 1e-3, 0.3),
    234_500_000_000: (2.2e-4, 3072 + 8 * 768, 1e-3, 0.3),  # half way up the ramp
    468_999_990_000: (2.2e-4, 15360 - 768, 1e-3, 0.3),
    469_000_000_000: (2.2e-4, 15360, 1e-3, 0.3),
    9_999_999_990_000: (2.2e-4, 15360, 1e-3, 0.3),
    10_000_000_000_000: (2.2e-4, 15360, 1e-3, 0.1),
    10_000_000_000_000 + 4_300_000_000_000 // 3: (2.2e-5 + 0.75 * 1.98e-4, 15360, 1e-3, 0.1),
    12_150_000_000_000: (1.21e-4, 15360, 1e-3, 0.1),  # middle of the cosine
    14_299_999_990_000: (2.2e-5, 15360, 1e-3, 0.1),
    14_300_000_000_000: (2.2e-5, 15360, 0.0, 0.1),
    14_632_999_990_000: (2.2e-5, 15360, 0.0, 0.1),
    14_633_000_000_000: (7.3e-6, 15360, 0.0, 0.1),
    14_800_000_000_000: (7.3e-6, 15360, 0.0, 0.1),
}


@pytest.mark.parametrize("tokens", GOLDEN)
def test_published_values(tokens: int) -> None:
    value = V3.at(tokens)
    lr, *others = GOLDEN[tokens]
    assert value["lr"] == pytest.approx(lr, rel=1e-8)
    assert [value["batch"], value["gamma"], value["mtp_weight"]] == others


def test_the_whole_run_in_steps() -> None:
    """2000 steps of warm-up at the first batch size; the samples of all steps are the budget's."""
    assert V3.ramp.samples_after(2000) == 2000 * 3072 and V3.lr_at(V3.ramp.samples_after(2000)) == 2.2e-4
    assert V3.num_samples * 4096 == 14_800_000_000_000
    levels = list(V3.ramp.levels())
    assert [level.batch_size for level in levels] == list(range(3072, 15361, 768))
    for level in levels[1:]:
        # The step before began below the threshold of this level, this one does not.
        threshold = V3.ramp.thresholds[V3.ramp.batch_sizes.index(level.batch_size)]
        assert level.first_sample - (level.batch_size - 768) < threshold <= level.first_sample


@pytest.mark.parametrize("tokens", [10**9, 123_456_789_012, 14_800 * 10**9, 30 * 10**12])
def test_a_budget_scales_every_phase(tokens: int) -> None:
    """Points inside the phases; a sample of a small run is many of the published one."""
    small = Schedules(train_tokens=tokens)
    for published in (12.6e9, 100e9, 235e9, 450e9, 2e12, 11e12, 13e12, 14.4e12, 14.7e12):
        value, expected = small.at(published * tokens / 14.8e12), V3.at(published)
        assert value["lr"] == pytest.approx(expected["lr"], rel=5e-3)
        assert [value[k] for k in ("batch", "gamma", "mtp_weight")] == [
            expected[k] for k in ("batch", "gamma", "mtp_weight")
        ]


@given(st.integers(10**8, 10**14), st.integers(1, 40), st.integers(1, 40), st.integers(1, 16))
def test_steps_of_a_ramp_are_those_of_a_loop(
    tokens: int, start: int, increment: int, num_increments: int
) -> None:
    end = start + increment * num_increments
    ramp = Schedules(train_tokens=tokens, batch_size=end, batch_ramp=(start, increment)).ramp
    steps = samples = 0
    firsts: dict[int, tuple[int, int]] = {}
    while samples < ramp.thresholds[-1] and steps < 2000:
        firsts.setdefault(ramp.batch_size(samples), (steps, samples))
        assert ramp.samples_after(steps) == samples
        samples += ramp.batch_size(samples)
        steps += 1
    for level in ramp.levels():
        if level.batch_size in firsts:
            assert firsts[level.batch_size] == (level.first_step, level.first_sample)


@given(st.integers(0, 14_800 * 10**9))
def test_learning_rate_has_no_jump_but_the_last(tokens: int) -> None:
    samples = tokens // 4096
    before, after = V3.lr_at(samples), V3.lr_at(samples + 1)
    if (before, after) != (2.2e-5, 7.3e-6):
        assert math.isclose(before, after, abs_tol=1e-10)


@pytest.mark.parametrize(
    "ramp, message",
    [
        ((3072, 1000), "must reach --global-batch-size 15360 in whole increments"),
        ((15360, 768), "in whole increments"),
        ((3072, 0), "in whole increments"),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused(ramp: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = Schedules(batch_ramp=ramp).ramp
    with pytest.raises(ValueError, match="samples are too few for 16 increments"):
        _ = Schedules(train_tokens=10**6).ramp
    with pytest.raises(ValueError, match="increase from 0"):
        BatchRamp((0, 5, 5), (1, 2, 3))
