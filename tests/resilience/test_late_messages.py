"""On NCCL nobody waits for a message but the device: the watch names the one that is late, and all ranks end."""

import os
import threading
import time
from functools import partial
from pathlib import Path

from dsv3_megatron.resilience.watch import EXIT_STATUS, RankWatch
from tests.resilience.ranks import SCHEDULES, WORDS, run_to_the_end

LIMIT_S = 3.0


def test_nothing_is_said_after_the_cause(monkeypatch, capfd) -> None:
    """The main thread may notice the same loss while the watch already ends the process."""
    watch = RankWatch(0, 2, range(2), 1.0, lambda: None)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    watch.say("looking")
    watch._end_process("rank 1 is lost", store_answers=False)
    late = threading.Thread(target=watch.say, args=("looking again",), daemon=True)
    late.start()
    late.join(0.3)
    assert late.is_alive()
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["[rank 0] looking", "[rank 0] ends (starting): rank 1 is lost"]


def stand_still(rank: int, victim: int) -> None:
    """Messages as on NCCL, and a victim whose third attention does not end."""
    from dsv3_megatron import cpu
    from dsv3_megatron.backends import attention

    cpu.behave_like_nccl()
    if rank != victim:
        return
    attend, calls = attention._attend, []

    def stuck(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            time.sleep(600)
        return attend(*args, **kwargs)

    attention._attend = stuck


def test_the_watch_names_a_late_message(tmp_path: Path) -> None:
    words = [*WORDS, *SCHEDULES["dualpipe"], "--train-iters", "2", "--pipeline-timeout-s", str(LIMIT_S)]
    words += ["--rank-timeout-s", "120"]
    start = time.monotonic()
    ended = run_to_the_end(tmp_path, 2, words, partial(stand_still, victim=1))
    assert time.monotonic() - start < 60
    for rank, how in enumerate(ended):
        assert how.status == EXIT_STATUS, (rank, how.status, how.output[-3000:])
        last = how.output.strip().splitlines()[-1]
        assert last.startswith(f"[rank {rank}] ends (")
        assert "pipeline rank 0 waits for longer than 3 s: " in last
        assert "(rank 1 to rank 0)" in last or "(rank 0 to rank 1)" in last
