"""Two messages besides Megatron's between engines, coordinator and clients: new tokens of a request, and its abortion.

    engine → coordinator → client   [TOKENS, [[request, tokens, log_probs, top_log_probs], …]] → [TOKENS, request, …]
    client → coordinator → engine   [ABORT, request] → Megatron's SUBMIT_REQUEST with `abort` in its parameters

They use Megatron's own registries of headers and handlers. The coordinator is a process of its own that imports
nothing of ours; it gets them with the tokenizer that Megatron sends there (`IdsTokenizer`).
"""

import asyncio
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import msgpack
import zmq
from megatron.core.inference import headers
from megatron.core.inference.data_parallel_inference_coordinator import handlers
from megatron.core.inference.inference_client import InferenceClient
from megatron.core.inference.sampling_params import SamplingParams

from dsv3_megatron.inference.scheduler import LatentEngine

__all__ = ["IdsTokenizer", "ServedEngine", "Stream", "StreamingClient"]


class Stream(IntEnum):
    """Headers of ours, in a range that Megatron's leave free."""

    TOKENS = 100
    ABORT = 101


def _register() -> None:
    """Enter headers and handlers where Megatron looks for its own; once per process."""
    if Stream.TOKENS in handlers.HANDLERS:
        return
    taken = [member for member in Stream if member.value in headers._CODE_TO_MEMBER]
    if taken:
        raise RuntimeError(f"Megatron has taken the header {taken[0].value} of {taken[0]!r}")
    headers._CODE_TO_MEMBER.update({member.value: member for member in Stream})
    handlers.message_handler(Stream.TOKENS)(_forward_tokens)
    handlers.message_handler(Stream.ABORT)(_forward_abort)


def _forward_tokens(coordinator: Any, sender: bytes, payload: list[Any]) -> None:
    for request, *new in payload[1]:
        client = coordinator.request_id_to_client_id.get(request)
        if client is not None:
            number = coordinator.request_id_to_client_request_id[request]
            coordinator.router_socket.send_multipart([client, _packed([Stream.TOKENS.value, number, *new])])


def _forward_abort(coordinator: Any, sender: bytes, payload: list[Any]) -> None:
    for request, number in coordinator.request_id_to_client_request_id.items():
        if number == payload[1] and coordinator.request_id_to_client_id[request] == sender:
            rank = coordinator.request_id_to_rank[request]
            wish = [headers.Headers.SUBMIT_REQUEST.value, request, [], {"abort": True}]
            coordinator._send_to_engine(rank, _packed(wish))
            return


def _packed(message: Any) -> bytes:
    return msgpack.packb(message, use_bin_type=True)


class IdsTokenizer:
    """What Megatron's engines and coordinator take for a tokenizer; text is made by who answers the user.

    Ids stand for their text. Sent to another process, it registers our messages there.
    """

    eod = -1
    bos = None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _ids_tokenizer, ()

    def tokenize(self, text: str) -> list[int]:
        raise ValueError("requests come as token ids, not text")

    def detokenize(self, tokens: Sequence[int], **unused: Any) -> str:
        return " ".join(map(str, tokens))


def _ids_tokenizer() -> IdsTokenizer:
    _register()
    return IdsTokenizer()


class ServedEngine(LatentEngine):
    """The engine of a rank behind the coordinator: sends tokens as they come to who asked for a stream."""

    def __init__(self, *args: Any, **options: Any):
        _register()
        self._new: list[list[Any]] = []
        super().__init__(*args, **options)

    def add_request(
        self,
        request_id: int,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        on_tokens: Any = None,
    ) -> Any:
        result = super().add_request(request_id, prompt, sampling_params)
        if getattr(sampling_params, "stream", False) and request_id in self._watches:
            self._watches[request_id].on_tokens = _nothing  # `_tell` does the work
        return result

    def _tell(self, watch: Any, record: Any) -> None:
        if watch.on_tokens is None:
            return
        merged = [
            _of(record, key)
            for key in ("generated_tokens", "generated_log_probs", "generated_top_n_logprobs")
        ]
        if len(merged[0]) > watch.told:
            self._new.append([record.request_id, *(values[watch.told :] for values in merged)])
            watch.told = len(merged[0])

    def post_process_requests(self, *args: Any, **options: Any) -> Any:
        result = super().post_process_requests(*args, **options)
        new, self._new = self._new, []
        if new and self.is_mp_coordinator:
            self.socket_for_receiving_requests.send(_packed([Stream.TOKENS.value, new]))
        return result

    def abort(self, request_id: int) -> None:
        waiting = request_id in self.waiting_request_ids
        entry = self.requests.get(request_id)
        super().abort(request_id)
        if waiting and entry is not None and request_id not in self.requests and self.is_mp_coordinator:
            reply = [headers.Headers.ENGINE_REPLY.value, [entry.record.merge().serialize()]]
            self.socket_for_receiving_requests.send(_packed(reply))

    def _end(self, request_id: int, record: Any) -> None:
        super()._end(request_id, record)
        self.done.clear()  # Megatron sends results by itself


def _of(record: Any, key: str) -> list[Any]:
    """A list of the request over all its evictions."""
    return [value for request in record.requests for value in getattr(request, key) or ()]


def _nothing(tokens: list[int]) -> None:
    pass


class StreamingClient(InferenceClient):
    """Megatron's client; a request's tokens come through a queue, its result last.

    A queue holds `("tokens", tokens, log_probs, top_log_probs)` for requests with `stream`, and `("done", reply)`.
    """

    def __init__(self, coordinator_address: str):
        _register()
        self.queues: dict[int, asyncio.Queue[tuple[Any, ...]]] = {}
        super().__init__(coordinator_address)

    def submit(
        self, prompt: list[int], params: SamplingParams
    ) -> tuple[int, "asyncio.Queue[tuple[Any, ...]]"]:
        """Send a request; its number and its queue."""
        number = self.next_request_id
        self.add_request(prompt, params)
        self.queues[number] = asyncio.Queue()
        return number, self.queues[number]

    def abort(self, number: int) -> None:
        """End a request; nothing more comes of it."""
        if self.queues.pop(number, None) is not None:
            self.socket.send(_packed([Stream.ABORT.value, number]))

    async def _recv_task(self) -> None:
        """As Megatron's, with our message too."""
        while True:
            try:
                header, number, *content = msgpack.unpackb(self.socket.recv(flags=zmq.NOBLOCK), raw=False)
            except zmq.Again:
                await asyncio.sleep(0.002)
                continue
            if header == Stream.TOKENS.value:
                if queue := self.queues.get(number):
                    queue.put_nowait(("tokens", *content))
                continue
            (reply,) = content
            reply["latency"] = time.perf_counter() - self.request_submission_times.pop(number)
            self.completion_futures.pop(number).cancel()
            if queue := self.queues.pop(number, None):
                queue.put_nowait(("done", reply))
