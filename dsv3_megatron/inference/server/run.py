"""The server of a rank: Megatron's engine loop and coordinator, HTTP on the first rank, an orderly end."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from hypercorn.asyncio import serve
from hypercorn.config import Config
from megatron.core.inference.apis._llm_base import _CoordinatorRuntime, _EventLoopManager
from megatron.core.inference.apis.async_llm import MegatronAsyncLLM

from dsv3_megatron.inference.engine import Engine
from dsv3_megatron.inference.server.app import Served, Server
from dsv3_megatron.inference.server.messages import StreamingClient

__all__ = ["Address", "LatentLLM", "run_server"]

BACKLOG = 1024  # connections that the system keeps until they are accepted
WATCH_S = 0.2
END_S = 60.0  # for engines and coordinator to end, when no answers are under way


@dataclass(frozen=True)
class Address:
    """Where the server listens, and where the coordinator does for the other ranks."""

    host: str
    port: int
    coordinator_host: str


class LatentLLM(MegatronAsyncLLM):
    """Megatron's asynchronous API over an engine that exists already; what follows construction is Megatron's."""

    def __init__(self, engine: Engine, coordinator_host: str):
        self._engine, self._context, self._controller = (
            engine.engine,
            engine.context,
            engine.engine.controller,
        )
        self._use_coordinator = True
        self._is_primary_rank = dist.get_rank() == 0
        self._shutdown_called = self._serve_started = False
        self._loop_manager = _EventLoopManager()
        self._loop_manager.start()
        self._coord_runtime = _CoordinatorRuntime(
            self._engine,
            is_primary=self._is_primary_rank,
            coordinator_host=coordinator_host,
            coordinator_port=None,
        )
        try:
            self._loop_manager.run_sync(self._coord_runtime.setup(loop=self._loop_manager.loop))
        except BaseException:
            self._loop_manager.run_sync(self._coord_runtime.teardown())
            self._loop_manager.stop()
            raise

    async def close(self) -> None:
        """End the engines and the coordinator; without their consent where they do not answer."""
        try:
            await asyncio.wait_for(self.shutdown(), END_S)
        except TimeoutError:
            _say(f"closing: the engines did not end within {END_S:g} s")
        coordinator = self._engine.inference_coordinator_process
        coordinator.join(timeout=2)
        if coordinator.is_alive():  # it has nothing left to do, but takes its time to take everything down
            coordinator.kill()

    @property
    def coordinator_address(self) -> str:
        """Of the coordinator, for clients."""
        return self._coord_runtime.coord_addr

    @property
    def loop_ended(self) -> str | None:
        """Why the engine's loop is over, None while it runs."""
        task = self._engine.engine_loop_task
        if not task.done():
            return None
        error = None if task.cancelled() else task.exception()
        return f"the engine has stopped: {error!r}" if error else "the engine has stopped"


def run_server(
    engine: Engine,
    served: Served,
    address: Address,
    max_requests: int,
    grace_s: float,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until SIGTERM or SIGINT, then write the answers under way to the end; the exit status.

    On ranks other than the first: work until the first one ends.

    Args:
        max_requests: answers under way; more are refused with 429.
        grace_s: how long answers under way may take after the signal.
        on_ready: called on the first rank when requests are let in.
    """
    logging.getLogger().setLevel(logging.WARNING)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the coordinator's process
    llm = LatentLLM(engine, address.coordinator_host)
    with engine.active(), _signals() as asked_to_end:
        return asyncio.run(_run(llm, served, address, max_requests, grace_s, on_ready, asked_to_end))


async def _run(
    llm: LatentLLM,
    served: Served,
    address: Address,
    max_requests: int,
    grace_s: float,
    on_ready: Callable[[], None],
    asked_to_end: list[int],
) -> int:
    if not llm.is_primary_rank:
        await llm.wait_for_shutdown()
        return 0
    client = StreamingClient(llm.coordinator_address)
    client.start(asyncio.get_running_loop())
    server = Server(served, client, max_requests)
    stop = asyncio.Event()
    config = Config()
    config.bind = [f"{address.host}:{address.port}"]
    config.backlog = BACKLOG
    config.graceful_timeout = 1.0  # answers are finished by then
    config.loglevel = "WARNING"
    http = asyncio.create_task(serve(server.app(), config, shutdown_trigger=stop.wait))  # type: ignore[arg-type]
    try:
        await asyncio.sleep(0)
        on_ready()
        await _until_end(llm, server, http, asked_to_end)
        if not server.failed and not http.done():
            _say(f"closing: {server.num_requests} answers are written to the end, at most {grace_s:g} s")
            if not await server.drained(grace_s, hurried=lambda: len(asked_to_end) > 1):
                _say(f"closing: {server.num_requests} answers are cut short")
    finally:
        stop.set()
        await asyncio.gather(http, return_exceptions=True)
        # The coordinator dies of an answer to a client that is gone (ROUTER_MANDATORY), and aborted requests may
        # still have one to come: the client goes last.
        if not server.failed:
            await llm.close()
        client.stop()
    error = server.failed or http.exception()
    if error:
        _say(f"error: {error}")
    return int(bool(error))


async def _until_end(
    llm: LatentLLM, server: Server, http: "asyncio.Task[Any]", asked_to_end: list[int]
) -> None:
    while not asked_to_end and not http.done():
        server.failed = llm.loop_ended
        if server.failed:
            await asyncio.sleep(1.5)  # requests under way are told
            return
        await asyncio.sleep(WATCH_S)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; ranks other than the first end with the first."""
    caught: list[int] = []

    def handler(number: int, frame: Any) -> None:
        caught.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
