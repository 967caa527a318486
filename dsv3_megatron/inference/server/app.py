"""The HTTP endpoints: `/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/health`."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from quart import Quart, Response, jsonify, request

from dsv3_megatron.inference.sampling import request_seed
from dsv3_megatron.inference.scheduler import RequestParams
from dsv3_megatron.inference.server.messages import StreamingClient
from dsv3_megatron.inference.server.replies import Choice, Form, Piece, error_body
from dsv3_megatron.inference.server.requests import (
    BadRequest,
    Limits,
    Request,
    chat_request,
    completion_request,
)
from dsv3_megatron.inference.text import json_value

__all__ = ["Served", "Server"]

LARGEST_BODY = 64 * 2**20  # bytes; a prompt of a million tokens as ids takes 8 MB


@dataclass(frozen=True)
class Served:
    """The model behind the server.

    Attributes:
        ends: token ids that end an answer.
        encode, decode, token_text: text to ids, ids to text, one id to its text; None without a tokenizer.
        chat: messages to ids, raises ValueError; None without a chat template.
    """

    limits: Limits
    ends: tuple[int, ...]
    encode: Callable[[str], list[int]] | None
    decode: Callable[[list[int]], str] | None
    token_text: Callable[[int], str] | None
    chat: Callable[[Any], list[int]] | None


class Overloaded(Exception):
    """More requests than are let in; the client is to come again."""


class EngineFailed(Exception):
    """No answer will come; the text says why."""


class Server:
    """Takes requests to the engines and answers back; lets in only so many at a time.

    Args:
        max_requests: answers that are being written or wait for it; more are refused with 429.

    Attributes:
        num_requests: answers under way.
        closing: no new requests are let in (503).
        cut: why answers under way are not written on.
        failed: why the engines have stopped; every request then gets 500.
    """

    def __init__(self, served: Served, client: StreamingClient, max_requests: int):
        self.served, self.client, self.max_requests = served, client, max_requests
        self.num_requests = 0
        self.closing = False
        self.cut: str | None = None
        self.failed: str | None = None

    def app(self) -> Quart:
        """The application, for an ASGI server."""
        app = Quart(__name__)
        app.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
        app.config["BODY_TIMEOUT"] = 60
        app.config["RESPONSE_TIMEOUT"] = None  # a long answer takes its time
        app.add_url_rule("/v1/completions", view_func=self._completions, methods=["POST"])
        app.add_url_rule("/v1/chat/completions", view_func=self._chat_completions, methods=["POST"])
        app.add_url_rule("/v1/models", view_func=self._models, methods=["GET"])
        app.add_url_rule("/v1/models/<path:name>", view_func=self._model, methods=["GET"])
        app.add_url_rule("/health", view_func=self._health, methods=["GET"])
        for status in (404, 405, 413, 500):
            app.register_error_handler(status, _as_json)
        return app

    async def drained(self, seconds: float, hurried: Callable[[], bool]) -> bool:
        """Let no one in, and wait until all answers are written, at most so long; whether they are.

        Those that are not are cut: an HTTP server waits for its connections, however long an answer is.
        """
        self.closing = True
        for _ in range(max(1, int(seconds * 20))):
            if not self.num_requests:
                return True
            if hurried():
                break
            await asyncio.sleep(0.05)
        self.cut = "the server has closed"
        return False

    async def _completions(self) -> Response:
        return await self._answered(
            lambda body: completion_request(body, self.served.limits, self.served.encode)
        )

    async def _chat_completions(self) -> Response:
        served = self.served
        return await self._answered(lambda body: chat_request(body, served.limits, served.chat), chat=True)

    async def _answered(self, check: Callable[[Any], Request], chat: bool = False) -> Response:
        try:
            self._check_open()
            asked = check(await _json_body())
            form = Form(chat, self.served.limits.model, asked)
            if asked.stream:
                # The generator takes its places with its first step; are there any, before it says 200?
                self._check_room(len(asked.prompts) * asked.n)
                return _event_stream(self._events(asked, form, chat))
            return jsonify(await self._whole(asked, form))
        except BadRequest as error:
            return _error(error.status, str(error), "invalid_request_error", error.param)
        except Overloaded as error:
            response = _error(503 if self.closing else 429, str(error), "overloaded_error")
            response.headers["Retry-After"] = "1"
            return response
        except EngineFailed as error:
            return _error(500, str(error), "server_error")

    def _check_open(self) -> None:
        if self.failed:
            raise EngineFailed(self.failed)
        if self.closing:
            raise Overloaded("the server is closing")

    def _check_room(self, count: int) -> None:
        if count > self.max_requests:
            raise BadRequest(
                f"{count} answers were asked for, at most {self.max_requests} are written at a time", "n"
            )
        if self.num_requests + count > self.max_requests:
            raise Overloaded(
                f"{self.num_requests} answers are under way, at most {self.max_requests} are let in"
            )

    @asynccontextmanager
    async def _submitted(self, asked: Request) -> AsyncIterator[list[tuple[Choice, asyncio.Queue[Any]]]]:
        """Requests of all choices at the engines; what is unfinished at the end is aborted."""
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        self._check_room(len(prompts))
        self.num_requests += len(prompts)
        numbers, choices = [], []
        try:
            for index, prompt in enumerate(prompts):
                number, queue = self.client.submit(prompt, self._params(asked, index))
                numbers.append(number)
                choices.append((self._choice(index, prompt, asked), queue))
            yield choices
        finally:
            self.num_requests -= len(prompts)
            for number in numbers:
                self.client.abort(number)

    def _choice(self, index: int, prompt: list[int], asked: Request) -> Choice:
        served = self.served
        return Choice(index, prompt, asked, served.ends, served.decode, served.token_text or str)

    def _params(self, asked: Request, index: int) -> RequestParams:
        params = RequestParams.sampled(
            asked.temperature,
            asked.top_k,
            asked.top_p,
            num_tokens_to_generate=asked.max_tokens,
            return_log_probs=asked.top_logprobs is not None,
            top_n_logprobs=asked.top_logprobs or 0,
            skip_prompt_log_probs=not asked.echo,
            seed=request_seed(asked.seed, index),
            ends=() if asked.ignore_eos else self.served.ends,
            stop=asked.stop if self.served.decode is not None else (),
        )
        params.add_attributes({"stream": asked.stream})
        return params

    async def _whole(self, asked: Request, form: Form) -> dict[str, Any]:
        async with self._submitted(asked) as choices:
            results = []
            for choice, queue in choices:
                reply = (await self._next(queue))[1]
                piece = Piece()
                if asked.echo:
                    piece = choice.echoed(
                        reply.get("prompt_log_probs") or [], reply.get("prompt_top_n_logprobs") or []
                    )
                piece += choice.push(
                    reply["generated_tokens"],
                    reply.get("generated_log_probs") or [],
                    reply.get("generated_top_n_logprobs") or [],
                )
                results.append((choice, piece + choice.finish()))
            return form.whole(results)

    async def _events(self, asked: Request, form: Form, chat: bool) -> AsyncIterator[dict[str, Any]]:
        """Events of a stream, those of all choices as they come."""
        async with self._submitted(asked) as choices:
            merged: asyncio.Queue[Any] = asyncio.Queue()
            tasks = [asyncio.create_task(self._pump(choice, queue, merged)) for choice, queue in choices]
            try:
                for choice, _ in choices:
                    if chat or asked.echo:
                        yield form.piece(choice, choice.echoed([], []) if asked.echo else Piece(), first=True)
                left = len(choices)
                while left:
                    choice, message = await merged.get()
                    if isinstance(message, Exception):
                        raise message
                    left -= message[0] == "done"
                    piece = choice.finish() if message[0] == "done" else choice.push(*message[1:])
                    if piece.text or piece.tokens or choice.finish_reason:
                        yield form.piece(choice, piece)
                if asked.include_usage:
                    yield form.usage_event([choice for choice, _ in choices])
            finally:
                for task in tasks:
                    task.cancel()

    async def _pump(self, choice: Choice, queue: "asyncio.Queue[Any]", merged: "asyncio.Queue[Any]") -> None:
        """Move a choice's messages into the common queue."""
        try:
            while True:
                message = await self._next(queue)
                merged.put_nowait((choice, message))
                if message[0] == "done":
                    return
        except EngineFailed as error:
            merged.put_nowait((choice, error))

    async def _next(self, queue: "asyncio.Queue[Any]") -> Any:
        """The next message, or `EngineFailed` where none will come, or the request failed."""
        while True:
            if self.cut:
                raise EngineFailed(self.cut)
            try:
                message = await asyncio.wait_for(queue.get(), timeout=1.0)
            except TimeoutError:
                if self.failed:
                    raise EngineFailed(self.failed) from None
                continue
            if message[0] == "done" and message[1]["status"] == "FAILED":
                raise EngineFailed(f"the engine refused the request: {_reasons(message[1])}")
            return message

    async def _models(self) -> Response:
        return jsonify({"object": "list", "data": [self._model_entry()]})

    async def _model(self, name: str) -> Response:
        if name != self.served.limits.model:
            return _error(404, f"model {name!r} is not served", "invalid_request_error", "model")
        return jsonify(self._model_entry())

    def _model_entry(self) -> dict[str, Any]:
        limits = self.served.limits
        return {
            "id": limits.model, "object": "model", "created": 0, "owned_by": "dsv3_megatron",
            "max_model_len": limits.max_length,
        }  # fmt: skip

    async def _health(self) -> Response:
        state = "failed" if self.failed else "closing" if self.closing else "ok"
        response = jsonify({"status": state, "requests": self.num_requests})
        response.status_code = 200 if state == "ok" else 503
        return response


def _reasons(reply: dict[str, Any]) -> str:
    events: Sequence[dict[str, Any]] = reply.get("events") or []
    return (
        "; ".join(str(e["payload"]) for e in events if str(e.get("type", "")).startswith("ERROR"))
        or "unknown"
    )


async def _json_body() -> Any:
    try:
        return json_value(await request.get_data())
    except ValueError as error:
        raise BadRequest(f"the body is not JSON ({error})") from error


def _event_stream(events: AsyncIterator[dict[str, Any]]) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield f"data: {json.dumps(event)}\n\n".encode()
        except (EngineFailed, Overloaded) as error:
            yield f"data: {json.dumps(error_body(str(error), 'server_error'))}\n\n".encode()
        yield b"data: [DONE]\n\n"

    return Response(lines(), mimetype="text/event-stream", headers={"Cache-Control": "no-cache"})


def _error(status: int, message: str, kind: str, param: str | None = None) -> Response:
    response = jsonify(error_body(message, kind, param))
    response.status_code = status
    return response


async def _as_json(error: Any) -> Response:
    kind = "server_error" if error.code == 500 else "invalid_request_error"
    return _error(error.code, f"{error.name}: {error.description}", kind)
