"""A disk that is full in the middle of a save: all ranks say so and end, and the former checkpoint loads."""

import os
import resource
from pathlib import Path
from typing import Any

from dsv3_megatron.resilience import checkpoints
from tests.resilience.ranks import SCHEDULES, WORDS, run_to_the_end

ROOM = 300_000  # bytes; less than a rank's file, more than its log


def fill_disk(rank: int) -> None:
    """From the fourth step on rank 1 can write no file above `ROOM` bytes, as if that was what is left of its disk."""
    from dsv3_megatron.training import hooks

    def limit(call: dict[str, Any]) -> None:
        if call["iteration"] == 3 and rank == 1:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, most))

    hooks.before_step(limit)


def test_full_disk_in_a_save(tmp_path: Path) -> None:
    save = tmp_path / "checkpoints"
    words = [*WORDS, *SCHEDULES["1f1b"], "--save", str(save), "--load", str(save), "--save-interval", "2"]
    words += ["--train-iters", "6", "--rank-timeout-s", "60"]
    ended = run_to_the_end(tmp_path / "full", 2, words, fill_disk)
    assert all(how.status not in (0, None) for how in ended), [how.status for how in ended]
    told = f"the checkpoint of iteration 4 could not be written to --save {save}: File too large (rank 1). "
    told += "Complete there: iteration 2"
    assert told in ended[0].output, ended[0].output[-3000:]
    assert told in ended[1].output or "could not be written" in ended[1].output
    assert checkpoints.complete_iterations(save) == [2]
    assert os.path.getsize(tmp_path / "full" / "rank1.log") < ROOM
    resumed = run_to_the_end(tmp_path / "resumed", 2, words)
    assert [how.status for how in resumed] == [0, 0]
    assert checkpoints.complete_iterations(save)[-1] == 6
