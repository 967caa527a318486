"""Two halves of a forward pass, overlapped: one's messages to the experts travel beside the other's products.

Report §3.4.1: two microbatches of like weight; attention and experts of one run beside dispatch and combine of the
other. Here the tokens of a pass are cut in two. The second half comes after the first in every layer, so that a request
that is cut finds its earlier tokens in the cache. A half is a generator that hands out each of its messages and goes on
with the answer; messages of both travel in one lane, one after the other, in the same order on all ranks.
"""

import copy
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import WrappedTensor
from torch import Tensor

__all__ = ["Lane", "TwoBatches", "interleaved"]

Message = Callable[[], Any]


class Lane:
    """Where messages run: a stream of its own on a GPU (*not run*), else a thread of its own; in order."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "messages") if self._stream is None else None

    def start(self, message: Message) -> Callable[[], Any]:
        """Begin a message; the result is what waits for its answer."""
        if self._stream is not None:
            return self._start_on_stream(message)
        assert self._thread is not None
        future: Future[Any] = self._thread.submit(_in_inference, message)
        return future.result

    def _start_on_stream(self, message: Message) -> Callable[[], Any]:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            answer = message()
        event = self._stream.record_event()

        def wait() -> Any:
            torch.cuda.current_stream().wait_event(event)
            for tensor in answer if isinstance(answer, tuple) else (answer,):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(torch.cuda.current_stream())
            return answer

        return wait

    def close(self) -> None:
        """No more messages."""
        if self._thread is not None:
            self._thread.shutdown()


def _in_inference(message: Message) -> Any:
    with torch.inference_mode():  # of a thread, like all modes
        return message()


def interleaved(halves: list[Generator[Message, Any, Tensor]], lane: Lane) -> list[Tensor]:
    """Run generators in turns: each goes on to its next message while the others' messages travel.

    A generator yields a message, is sent its answer, and returns its result.
    """
    results: dict[int, Tensor] = {}
    waits: dict[int, Callable[[], Any]] = {}

    def go_on(number: int, answer: Any) -> None:
        try:
            waits[number] = lane.start(halves[number].send(answer))
        except StopIteration as end:
            results[number] = end.value
            waits.pop(number, None)

    for number in range(len(halves)):
        go_on(number, None)
    while waits:
        for number in sorted(waits):
            go_on(number, waits[number]())
    return [results[number] for number in range(len(halves))]


class TwoBatches:
    """The decoder's forward pass in two halves; in place of the block's own as long as `installed`.

    Args:
        block: Megatron's TransformerBlock.
        context: the engine's `LatentContext`.
    """

    def __init__(self, block: Any, context: Any):
        self.block, self.context = block, context
        self._own_forward = block.forward
        self._lane = Lane(torch.device(torch.cuda.current_device()))
        moe_layers = [layer for layer in block.layers if layer.is_moe_layer]
        # A dispatcher remembers the tokens that are under way.
        self._dispatchers = {
            layer: (layer.mlp.token_dispatcher, copy.copy(layer.mlp.token_dispatcher)) for layer in moe_layers
        }
        self._tp = block.pg_collection.tp
        self._scattered = block.config.sequence_parallel and self._tp.size() > 1

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The block runs in two halves."""
        self.block.forward = self._forward
        try:
            yield
        finally:
            del self.block.forward

    def close(self) -> None:
        """The messages' thread ends."""
        self._lane.close()

    def _forward(self, hidden_states: Any, attention_mask: Any, *args: Any, **options: Any) -> Any:
        if options.get("inference_context") is None:
            return self._own_forward(hidden_states, attention_mask, *args, **options)
        if isinstance(hidden_states, WrappedTensor):
            hidden_states = hidden_states.unwrap()
        if not self.block.pre_process:
            hidden_states = self.block.input_tensor
        whole = self._gathered(hidden_states)
        step = self._tp.size() if self._scattered else 1
        at = max(len(whole) // 2 // step, 1) * step
        pages = self.context.halves(self._rotary_embedding(), at)
        halves = [
            self._half(number, self._part(part), pages[number])
            for number, part in enumerate((whole[:at], whole[at:]))
        ]
        parts = interleaved(halves, self._lane)
        result = self._part(torch.cat([self._gathered(part) for part in parts]))
        return result if self.block.final_layernorm is None else self.block.final_layernorm(result)

    def _rotary_embedding(self) -> Any:
        return self.block.layers[0].self_attention.rotary_pos_emb

    def _gathered(self, hidden: Tensor) -> Tensor:
        """All tokens, on every tensor-parallel rank."""
        if not self._scattered or not len(hidden):
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self._tp)

    def _part(self, whole: Tensor) -> Tensor:
        """This rank's tokens of all."""
        if not self._scattered or not len(whole):
            return whole
        return scatter_to_sequence_parallel_region(whole, group=self._tp)

    def _half(self, number: int, hidden: Tensor, pages: Any) -> Generator[Message, Any, Tensor]:
        for layer in self.block.layers:
            if len(hidden):
                with self.context.standing(pages):
                    hidden, _ = layer._forward_attention(hidden, inference_context=self.context)
            if not layer.is_moe_layer:
                if len(hidden):
                    hidden = layer._forward_mlp(hidden, self.context)
                continue
            hidden = yield from self._moe(layer, self._dispatchers[layer][number], hidden)
        return hidden

    def _moe(
        self, layer: TransformerLayer, dispatcher: Any, residual: Tensor
    ) -> Generator[Message, Any, Tensor]:
        """The MoE half of a layer; a rank without tokens takes part in the messages."""
        moe = layer.mlp
        hidden = layer.pre_mlp_layernorm(residual)
        probs, routing_map = moe.route(hidden)

        def dispatch() -> Any:
            # With its counts, which are messages too: all that goes to the experts stays in one order.
            return dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, routing_map, probs))

        tokens, token_probs = yield dispatch
        moe.token_dispatcher = dispatcher
        chosen, _ = moe.routed_experts_compute(tokens, token_probs)

        def combine() -> Any:
            return dispatcher.token_combine(chosen)

        combined = yield combine
        output = dispatcher.combine_postprocess(combined)
        shared = moe.shared_experts_compute(hidden) if len(hidden) else None
        return residual + (output if shared is None else output + shared)
