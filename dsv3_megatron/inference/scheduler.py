"""Megatron's dynamic engine with what a request may want besides: a seed, several ends, stop strings, to be aborted."""

import faulthandler
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.inference_request import (
    DynamicInferenceRequest,
    DynamicInferenceRequestRecord,
    Status,
)
from megatron.core.inference.sampling_params import SamplingParams

from dsv3_megatron.inference.context import LatentContext
from dsv3_megatron.inference.text import TextStream

__all__ = ["LatentEngine", "RequestParams"]

# Importing Megatron's engine makes every process print its stack at Ctrl-C and SIGTERM, a pool's workers at their end.
for _end in (signal.SIGINT, signal.SIGTERM):
    faulthandler.unregister(_end)

LEAST_TEMPERATURE = 1e-6  # below it sampling is greedy, and logits / temperature leave fp32


class RequestParams(SamplingParams):
    """Megatron's parameters of a request, and ours; both travel to the engines as one dictionary.

    Args:
        seed: of the request's random numbers.
        ends: token ids that end the request; the first is Megatron's `termination_id`.
        stop: strings that end the request, wherever in a token they begin and end.
        abort: not a request but the wish that the one with this id ends.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        ends: tuple[int, ...] = (),
        stop: tuple[str, ...] = (),
        abort: bool = False,
        **of_megatron: Any,
    ):
        super().__init__(**of_megatron, termination_id=ends[0] if ends else -1)
        self.add_attributes({"seed": seed, "ends": list(ends), "stop": list(stop), "abort": abort})

    @classmethod
    def sampled(cls, temperature: float, top_k: int, top_p: float, **others: Any) -> "RequestParams":
        """As users say it: temperature 0 is greedy, top_k 0 and top_p 1 are no limit.

        Megatron keeps these in fp32 and int32, where what is too small would be 0 and what is too large none.
        """
        greedy = temperature < LEAST_TEMPERATURE
        return cls(
            temperature=1.0 if greedy else min(temperature, 1e30),
            top_k=1 if greedy else min(top_k, 2**31 - 1),
            top_p=0.0 if greedy or top_p == 1 else max(top_p, 1e-30),
            **others,
        )


@dataclass
class _Watch:
    """What is looked for in a request's tokens as they come."""

    ends: tuple[int, ...]
    stream: TextStream | None
    on_tokens: Callable[[list[int]], None] | None = None
    seen: int = 0  # tokens looked at
    told: int = 0  # tokens given to `on_tokens`
    stopped: bool = False
    aborted: bool = False

    def reason(self) -> str:
        """Why the request ended."""
        return "abort" if self.aborted else "stop" if self.stopped else "length"


class LatentEngine(DynamicInferenceEngine):
    """Megatron's engine over a `LatentContext`.

    Everything kept per request is keyed by its id: Megatron replaces the request's own object when it evicts it, and
    loses stop words then.

    Args:
        decode: token ids to text, for stop strings; None without a tokenizer.

    Attributes:
        done: records of requests that ended since `take_done`, why, and their prompts' `first_choices`.
    """

    context: LatentContext

    def __init__(
        self, controller: Any, context: LatentContext, decode: Callable[[list[int]], str] | None = None
    ):
        self._decode = decode
        self._watches: dict[int, _Watch] = {}
        self.done: list[tuple[DynamicInferenceRequestRecord, str, list[bool]]] = []
        super().__init__(controller, context)

    def add_request(
        self,
        request_id: int,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Any:
        """As Megatron's; `on_tokens` is called with new tokens after each step that has some."""
        params = sampling_params or RequestParams()
        if getattr(params, "abort", False):
            return self.abort(request_id)
        stop = tuple(getattr(params, "stop", ()))
        stream = TextStream(self._decode, stop) if stop and self._decode is not None else None
        self._watches[request_id] = _Watch(tuple(getattr(params, "ends", ())), stream, on_tokens)
        self.context.seeds[request_id] = getattr(params, "seed", 0)
        return super().add_request(request_id, prompt, params)

    def _add_request(self, request: DynamicInferenceRequest) -> Any:
        params = request.sampling_params
        if params.return_log_probs and not params.skip_prompt_log_probs:
            # A prompt's tokens have logits only if they are computed, not found in another request's pages.
            request.precomputed_block_hashes = []
        return super()._add_request(request)

    def abort(self, request_id: int) -> None:
        """End a request after the next step it takes part in; its tokens so far are its result.

        One that waits ends now. Nothing happens where it is done.
        """
        watch = self._watches.get(request_id)
        if watch is None:
            return
        watch.aborted = True
        if request_id in self.waiting_request_ids and request_id != self.context.chunked_prefill_request_id:
            self.waiting_request_ids.remove(request_id)
            entry = self.requests.pop(request_id)
            entry.record[-1].status = Status.COMPLETED
            entry.future.set_result(entry.record)
            self._end(request_id, entry.record)

    def take_done(self) -> list[tuple[DynamicInferenceRequest, str, list[bool]]]:
        """Requests that ended since the last call, merged, why, and their prompts' first choices."""
        done, self.done = self.done, []
        return [(record.merge(), reason, choices) for record, reason, choices in done]

    def _get_and_clear_stop_word_finished_ids(self, active_request_ids: list[int]) -> set[int]:
        aborted = {i for i in active_request_ids if self._watches[i].aborted}
        # Megatron keeps a request with a part of its prompt still to come active, whatever is said here.
        self.stop_word_finished_request_ids |= aborted - {self.context.chunked_prefill_request_id}
        return super()._get_and_clear_stop_word_finished_ids(active_request_ids)

    def _check_stop_words_for_request_post_append(self, request: DynamicInferenceRequest) -> tuple[bool, int]:
        """Whether the request ends with its newest tokens, and how many of them come after its end."""
        watch = self._watches[request.request_id]
        earlier = sum(len(r.generated_tokens) for r in self.requests[request.request_id].record.requests[:-1])
        new = request.generated_tokens[watch.seen - earlier :]
        for place, token in enumerate(new, 1):
            watch.seen += 1
            if watch.stream is not None:
                watch.stream.push([token])
            if token in watch.ends or (watch.stream is not None and watch.stream.stopped):
                watch.stopped = True
                if trim := len(new) - place:
                    request.generated_tokens = request.generated_tokens[:-trim]
                return True, trim
        return False, 0

    def post_process_requests(self, request_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        records = {int(i): self.requests[int(i)].record for i in request_ids}
        result = super().post_process_requests(request_ids, *args, **options)
        for request_id, record in records.items():
            self._tell(self._watches[request_id], record)
            if request_id not in self.requests:
                self._end(request_id, record)
        return result

    def _tell(self, watch: _Watch, record: DynamicInferenceRequestRecord) -> None:
        if watch.on_tokens is None:
            return
        tokens = [token for request in record.requests for token in request.generated_tokens]
        if len(tokens) > watch.told:
            new, watch.told = tokens[watch.told :], len(tokens)
            watch.on_tokens(new)

    def _handle_failed_request(self, request_id: int) -> None:
        super()._handle_failed_request(request_id)
        self._end(request_id, self.requests[request_id].record)

    def _end(self, request_id: int, record: DynamicInferenceRequestRecord) -> None:
        watch = self._watches.pop(request_id)
        self.context.seeds.pop(request_id, None)
        self.context.following_prompt_tokens.pop(request_id, None)
        choices = self.context.first_choices.pop(request_id, [])
        self.done.append((record, watch.reason(), choices))
