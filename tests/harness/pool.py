"""A fork server that has Megatron imported, and `run_distributed`, which runs a function on ranks forked from it.

Importing Megatron takes seconds per process; forking a process that has imported it takes milliseconds, shares its
memory, and gives every test untouched globals, so nothing has to be reset between tests.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_megatron.studies.ports import free_port

PATIENCE_S = 60.0  # how long a finished rank stays for its peers
GRACE_S = 3.0  # what the other ranks get to report their own error once one rank has failed


class DistributedFailure(AssertionError):
    """A rank raised, died or ran out of time; the message holds each failed rank's traceback and last output."""


@functools.cache
def _context() -> Any:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    return context


def _rank_main(
    fn: Callable,
    rank: int,
    world_size: int,
    init: bool,
    env: dict[str, str],
    log: str,
    conn: Any,
    kwargs: dict,
) -> None:
    """Body of one rank: environment, process group, the test's function; sends ("ok" | "error", pickled)."""
    os.setsid()  # whatever the rank starts (a checkpoint writer, data loaders) ends with it
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        import torch
        import torch.distributed as dist

        torch.manual_seed(0)
        if os.environ.get("DSV3_TEST_LIKE_NCCL") == "1":  # `make test-nccl`
            from dsv3_megatron import cpu

            cpu.behave_like_nccl(limit_s=60)
        if init:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        value = fn(rank, world_size, **kwargs)
        message = ("ok", pickle.dumps(value))
    except BaseException:
        message = ("error", pickle.dumps(traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    conn.send(message)
    conn.poll(PATIENCE_S)  # until the parent has every rank's answer: peers may still be talking to this one
    os._exit(0)  # no destructors: a failed peer must not make this rank hang in process-group shutdown


def run_distributed(
    fn: Callable,
    world_size: int = 4,
    timeout: float = 120,
    init: bool = True,
    log_dir: Path | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(rank, world_size, **kwargs)` on `world_size` fresh ranks and return their values in rank order.

    Args:
        fn: function at module level; kwargs and return values must be picklable.
        timeout: seconds for the whole call; past it all ranks are killed and the test fails.
        init: initialise torch.distributed (gloo) first; False where `fn` does so, e.g. when it calls the trainer.
            RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set either way.
        log_dir: where to keep what the ranks print (`rank0.log`, …); a temporary folder by default.

    Raises:
        DistributedFailure: with the traceback (or the last output) of every rank that failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        logs = [Path(log_dir or scratch) / f"rank{rank}.log" for rank in range(world_size)]
        env = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        env["LOCAL_WORLD_SIZE"] = str(world_size)
        if "DSV3_TEST_LIKE_NCCL" in os.environ:
            env["DSV3_TEST_LIKE_NCCL"] = os.environ["DSV3_TEST_LIKE_NCCL"]
        ranks, pipes = [], []
        for rank in range(world_size):
            receive, send = _context().Pipe()
            args = (fn, rank, world_size, init, env, str(logs[rank]), send, kwargs)
            process = _context().Process(target=_rank_main, args=args)
            process.start()
            send.close()
            ranks.append(process)
            pipes.append(receive)
        try:
            outcomes = _collect(pipes, time.monotonic() + timeout)
        finally:
            for pipe in pipes:
                pipe.close()
            for process in ranks:
                process.join(0.5)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
        errors = []
        for rank, (status, payload) in enumerate(outcomes):
            if status != "ok":
                tail = logs[rank].read_text(errors="replace")[-3000:] if logs[rank].exists() else ""
                errors.append(f"--- rank {rank}: {status}\n{payload}\nlast output:\n{tail}")
        if errors:
            raise DistributedFailure(f"{len(errors)} of {world_size} ranks failed\n" + "\n".join(errors))
        return [payload for _, payload in outcomes]


def _collect(pipes: list[Any], deadline: float) -> list[tuple[str, Any]]:
    """Wait for each rank's message; after the first failure the others have GRACE_S left."""
    outcomes: list[tuple[str, Any]] = [("no answer (hung or killed)", "")] * len(pipes)
    waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready: list[Any] = multiprocessing.connection.wait(list(waiting), left)
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                status, payload = pipe.recv()
                outcomes[rank] = (status, pickle.loads(payload))
            except EOFError:
                outcomes[rank] = ("died without an answer", "")
            if outcomes[rank][0] != "ok":
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return outcomes
