"""Host memory of checkpoints, against sums by hand and the figures of an audit."""

import pytest

from dsv3_megatron.checkpoint.host_memory import host_memory, problem

GB = 1e9


def test_the_published_layout() -> None:
    """About 3.26B parameters on the fullest of 2048 ranks: 313 GB per machine of 8."""
    memory = host_memory(2.6e9, 0.66e9, 8)
    assert memory.save == memory.load == pytest.approx(313e9, rel=0.01)


def test_the_memory_efficient_form_saves_on_one_rank_of_each_group_and_loads_on_all() -> None:
    memory = host_memory(2e9, 1e9, 8, dense_ranks_per_stage=2, memory_efficient=True)
    assert memory.save == 12 * (8 * 2e9 + 2 * 1e9)
    assert memory.load == 12 * 8 * 3e9


def test_the_average_is_there_all_the_time_and_copied_for_a_background_save() -> None:
    memory = host_memory(0, 1e9, 4, average=True, async_save=True)
    assert memory.average == 4 * 4e9 and memory.save == (12 + 4) * 4e9 and memory.peak == (16 + 4) * 4e9
    assert host_memory(0, 1e9, 4, reshardable=False).peak == 0


def test_an_offloaded_optimizer_is_there_all_the_time_and_may_be_too_much_alone() -> None:
    memory = host_memory(0, 1e9, 4, offloaded=0.5e9)
    assert memory.optimizer == 16 * 4 * 0.5e9 and memory.peak == 12 * 4e9 + memory.optimizer
    found = problem(memory, memory.optimizer - 1, False)
    assert found is not None and found[0] == "--optimizer-cpu-offload"
    assert "32 for the offloaded optimizer" in found[1] and "--optimizer-offload-fraction" in found[2]
    assert problem(memory, memory.peak, False) is None


@pytest.mark.parametrize(
    ("available", "efficient", "use"),
    [
        (400 * GB, False, None),
        (300 * GB, True, None),
        (100 * GB, True, "machines with more memory"),
    ],
)
def test_what_does_not_fit_says_what_to_use(available: float, efficient: bool, use: str | None) -> None:
    memory = host_memory(0.0, 3e9, 8, memory_efficient=efficient)  # 288 GB to load
    found = problem(memory, available, efficient)
    if use is None or available >= 288 * GB:
        assert found is None
    else:
        assert found is not None and use in found[2]


def test_a_save_that_does_not_fit_is_offered_the_memory_efficient_form() -> None:
    memory = host_memory(0.0, 3e9, 8, average=True, async_save=True)
    available = memory.load + memory.average + 1
    found = problem(memory, available, False)
    assert found is not None and "--distrib-optim-fully-reshardable-mem-efficient" in found[2]
