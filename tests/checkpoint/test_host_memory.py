"""The trainer refuses a checkpoint that a machine has no memory for: before the first step, on every rank."""

from functools import partial
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint import host_memory
from tests.arguments.lines import MICRO
from tests.harness import run_distributed

WORDS = [
    *(*MICRO, "--spec", "dsv3", "--device", "cpu", "--expert-model-parallel-size", "2", "--train-iters", "1"),
    *("--use-distributed-optimizer", "--log-interval", "1", "--lr-decay-iters", "10"),
]


def start(rank: int, world_size: int, words: list[str], least: float) -> str:
    """What the trainer is refused with on machines of which the last has `least` bytes; "" where it trains."""
    from dsv3_megatron.errors import RefusedArgument
    from dsv3_megatron.train import main

    if rank == world_size - 1:
        host_memory.of_this_machine = partial(float, least)  # type: ignore[assignment]
    try:
        main(words)
    except RefusedArgument as refused:
        return str(refused)
    return ""


def run(least: float, *words: str) -> list[str]:
    return run_distributed(start, world_size=2, init=False, words=[*WORDS, *words], least=least)


def test_one_small_machine_is_enough(tmp_path: Path) -> None:
    refused = run(1e6, "--save", str(tmp_path), "--save-interval", "1")
    assert (
        refused[0] == refused[1] and "--dist-ckpt-optim-fully-reshardable: loading a checkpoint" in refused[0]
    )
    assert "more pipeline or expert-parallel ranks" in refused[0]
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("least", [1e6, 1e12])
def test_nothing_is_refused_that_saves_nothing_or_has_room(least: float, tmp_path: Path) -> None:
    assert run(least, *([] if least < 1e12 else ["--save", str(tmp_path), "--save-interval", "1"])) == [
        "",
        "",
    ]


def test_a_container_has_what_it_may_have(tmp_path: Path) -> None:
    machine = host_memory.of_this_machine(tmp_path / "none")
    for text, wanted in (("max\n", machine), ("123456\n", 123456.0), ("9" * 30, machine)):
        (tmp_path / "memory.max").write_text(text)
        assert host_memory.of_this_machine(tmp_path / "memory.max") == wanted
    assert machine > 1e9
