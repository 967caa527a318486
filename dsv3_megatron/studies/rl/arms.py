"""The processes of the demonstration: forked from one that has Megatron imported, some at a time, each goes on."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

from dsv3_megatron.studies.ports import free_port
from dsv3_megatron.studies.rl.arm import Arm
from dsv3_megatron.studies.rl.worker import work

__all__ = ["DemoFailed", "run_arms"]


class DemoFailed(RuntimeError):
    """An arm ended with an error; the text says which, and where its output is."""


@dataclass
class _Running:
    arm: Arm
    process: Any
    told: int = 0  # bytes of its output that have been looked at
    started: float = field(default_factory=time.monotonic)


def run_arms(arms: Sequence[Arm], at_once: int) -> None:
    """Run what is not done yet, so many at a time.

    Raises:
        DemoFailed: an arm failed; the others have been ended.
    """
    waiting = [arm for arm in arms if not arm.done]
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(0)))
            connection.wait([each.process.sentinel for each in running], timeout=0.5)
            for each in list(running):
                alive = each.process.is_alive()
                _tell(each)
                if alive:
                    continue
                running.remove(each)
                if each.process.exitcode or not each.arm.done:
                    log = each.arm.folder / "log"
                    raise DemoFailed(
                        f"{each.arm.name} ended with status {each.process.exitcode}: its output is {log}"
                    )
                print(f"[demo] {each.arm.name}: done in {time.monotonic() - each.started:.0f} s", flush=True)
    finally:
        for each in running:
            each.process.kill()
        for each in running:
            each.process.join()


def _start(arm: Arm) -> _Running:
    os.environ.update(
        OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""
    )  # of the fork server, before it imports torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dsv3_megatron.studies.rl.preload"])
    arm.folder.mkdir(parents=True, exist_ok=True)
    log = arm.folder / "log"
    log.write_bytes(b"")
    process = context.Process(target=_body, args=(arm, str(log)))
    process.start()
    return _Running(arm, process)


def _body(arm: Arm, log: str) -> None:
    """Of a process: the output into a file, the surroundings of a rank that is alone, the trainer."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal: the command ends us
    threading.Thread(target=_leave_with_the_command, daemon=True).start()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    work(arm)


def _leave_with_the_command() -> None:
    """Also where it was killed: a second run must not find the first one's trainers at work in its folders."""
    command = multiprocessing.parent_process()
    if command is not None:
        connection.wait([command.sentinel])
        os._exit(1)


def _tell(running: _Running) -> None:
    """Print the arm's new lines that are for people."""
    with (running.arm.folder / "log").open("rb") as log:
        log.seek(running.told)
        text = log.read()
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        if line.startswith("[demo]"):
            print(f"[demo] {running.arm.name}:{line.removeprefix('[demo]')}", flush=True)
    running.told += len(whole)
