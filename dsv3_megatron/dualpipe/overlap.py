"""An overlapped pair of a forward and a backward: the nodes of two schedule plans, in the order of a table.

A layer of a plan is four nodes (attention, dispatch, MLP, combine) and, in the MTP layer, a fifth at its end. While a
communicating node of one half is under way, a computing node of the other runs. On a GPU the two are on two streams,
as Megatron's nodes do by themselves. On CPU there is one stream: a thread stands in for the communication stream, and
gloo's all-to-all waits there.
"""

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Self

import torch
from megatron.core.models.common.model_chunk_schedule_plan import (
    TransformerLayerSchedulePlan,
    TransformerModelChunkSchedulePlan,
)
from megatron.core.pipeline_parallel.utils import NoopScheduleNode, get_comm_stream
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor

from dsv3_megatron import cpu
from dsv3_megatron.cpu import streams
from dsv3_megatron.dualpipe.chunk import ChunkStage
from dsv3_megatron.dualpipe.pair_orders import ATTENTION, COMMUNICATION, ORDERS, NodeEvent, NodeStep
from dsv3_megatron.pipeline.stage import Half, one_after_the_other


class CommunicationThread:
    """Runs functions one after the other in a thread of its own: what a communication stream is on a GPU."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        # Daemonic: a process that ends on an error must not wait for a collective that never will.
        threading.Thread(target=_serve, args=(self._queue,), name="pair-communication", daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def submit(self, function: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._queue.put((future, function))
        return future


def _serve(tasks: queue.SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, function = task
        try:
            future.set_result(function())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)
        del task, future, function


class PairRunner:
    """Runs overlapped pairs of `ChunkStage`s; an `Overlap` of the pipeline runner (pipeline/stage.py).

    Args:
        order: a name of `ORDERS`.

    Attributes:
        events: set to a list to have the nodes of all following pairs measured, in the order of their ends. On
            a GPU these are the times of issuing. Measured pairs go through our own loop in either order.
        thread: takes the communicating nodes; None (as on a GPU) runs each where it stands in the order.
    """

    def __init__(self, order: str = "megatron") -> None:
        if order not in ORDERS:
            raise ValueError(f"--pipeline-pair-order {order}: choose from {', '.join(ORDERS)}")
        self.order = order
        self.events: list[NodeEvent] | None = None
        self.thread = CommunicationThread() if cpu.is_active() else None

    def __call__(self, forward: Half, backward: Half) -> None:
        """Run the pair; both results are sent before the last weight gradients of attention."""
        f, b = forward.stage, backward.stage
        assert isinstance(f, ChunkStage) and isinstance(b, ChunkStage)
        if not f.step.use_plans:
            one_after_the_other(forward, backward)
            return
        plan, loss_func = f.plan(forward.which, forward.input)  # while the messages are under way
        forward.receive()
        saved, gradient = b.start_backward(backward.which, backward.receive())
        assert saved.plan is not None

        def send_forward(output: Tensor, vp_stage: Any = None) -> None:
            forward.send(None if f.is_last else output.detach())

        def send_backward(gradient: Tensor, vp_stage: Any = None) -> None:
            backward.send(None if saved.activation is None else gradient)

        thread = None if streams.recorder is not None else self.thread  # a record of streams sees one thread
        if self.order == "megatron" and thread is None and self.events is None:
            output = plan.run(
                plan, saved.plan, b_grad=gradient, post_forward=send_forward, post_backward=send_backward
            )
        else:
            sends = (send_forward, send_backward)
            output = run_pair(ORDERS[self.order], plan, saved.plan, gradient, sends, thread, self.events)
        f.planned(forward.which, forward.input, plan, loss_func, output)
        b.finish_gradients(backward.which)


def run_pair(
    order: Sequence[NodeStep],
    forward: TransformerModelChunkSchedulePlan,
    backward: TransformerModelChunkSchedulePlan,
    gradient: Tensor,
    sends: tuple[Callable[[Tensor], None], Callable[[Tensor], None]],
    thread: CommunicationThread | None = None,
    events: list[NodeEvent] | None = None,
) -> Tensor:
    """The forward of one plan beside the backward of another; what `TransformerModelChunkSchedulePlan.run` does.

    The n-th layer forward runs with the n-th last layer backward; where one chunk has more layers, its rest runs alone.
    Both results leave before the weight gradients of the last layer's attention.

    Args:
        order: what happens in each layer.
        forward: not yet run.
        backward: its forward has run.
        gradient: of `backward`'s output.
        sends: called with the output of `forward`'s layers and with the gradient of `backward`'s input, in this order.
        thread: takes the communicating nodes.
        events: measured nodes are appended.

    Returns:
        The output of `forward`.
    """
    forward.record_current_stream()
    values: dict[str, Any] = {
        "F": forward.pre_process.forward()
    }  # what each half has come to, perhaps a Future
    backward.record_current_stream()
    values["B"] = gradient if backward.post_process is None else backward.post_process.backward(gradient)

    send_forward, send_backward = sends

    def finished_forward(output: Tensor) -> None:
        with torch.cuda.stream(get_comm_stream()):  # where it was made: computing goes on meanwhile
            forward.wait_current_stream()
            send_forward(output)

    def finished_backward(gradient: Tensor) -> None:
        backward.wait_current_stream()
        send_backward(gradient)

    with _Issue(thread if _may_run_beside(forward, backward) else None) as issue:
        num_forward, num_backward = forward.num_layers(), backward.num_layers()
        last: list[Callable[[Any], Any]] = []  # weight gradients that run when both results have left
        last_layer: TransformerLayerSchedulePlan | None = None
        for i in range(max(num_forward, num_backward)):
            layers: dict[str, TransformerLayerSchedulePlan] = {}
            if i < num_forward:
                layers["F"] = forward.get_layer(i)
            if i < num_backward:
                layers["B"] = last_layer = backward.pop_layer()
            for step in order:
                node = getattr(layers.get(step.half), step.node, None)
                if node is None or isinstance(node, NoopScheduleNode):
                    continue
                number = i if step.half == "F" else num_backward - 1 - i
                call = _call(layers[step.half], node, step, number, events)
                if step == ("B", ATTENTION, "backward_dw") and i == num_backward - 1:
                    last.append(call)
                elif step.operation == "backward_dw":
                    issue.compute(call, None)
                elif step.node in COMMUNICATION:
                    values[step.half] = issue.communicate(call, values[step.half])
                else:
                    values[step.half] = issue.compute(call, values[step.half])
            if "B" in layers and i < num_backward - 1:
                issue.compute(_release, layers["B"])
        issue.compute(finished_forward, values["F"])
        issue.compute(finished_backward, values["B"])
        for call in last:
            issue.compute(call, None)
        if last_layer is not None:
            issue.compute(_release, last_layer)
    output = _result(values["F"])
    if forward.post_process is not None:
        output = forward.post_process.forward(output)
    backward.pre_process.backward(_result(values["B"]))
    forward.wait_current_stream()
    backward.wait_current_stream()
    backward.release_state()
    return output


def _release(layer: TransformerLayerSchedulePlan) -> None:
    layer.release_state()


class _Issue:
    """Computing and communicating nodes, issued one by one and executed as two streams would.

    Each kind runs in the order in which it was issued, and a node when its input is there. So nodes are only noted
    here, and run at the end of the block: computing ones in this thread, communicating ones in theirs. Without a
    thread each runs when it is issued.
    """

    def __init__(self, thread: CommunicationThread | None) -> None:
        self._thread = thread
        self._computing: deque[tuple[Callable[[Any], Any], Any, Future]] = deque()

    def compute(self, call: Callable[[Any], Any], value: Any) -> Any:
        """Issue `call(value)`; returns its result or a Future of it. `value` may be one too."""
        if self._thread is None:
            return call(value)
        future: Future = Future()
        self._computing.append((call, value, future))
        return future

    def communicate(self, call: Callable[[Any], Any], value: Any) -> Any:
        """The same for the communication thread."""
        if self._thread is None:
            return call(value)
        return self._thread.submit(lambda: call(_result(value)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, traceback: Any) -> None:
        while self._computing:
            call, value, future = self._computing.popleft()
            if error is not None:
                future.set_exception(error)  # whoever waits for it must not wait for ever
                continue
            try:
                future.set_result(call(_result(value)))
            except BaseException as raised:
                self.__exit__(type(raised), raised, None)
                raise


def _call(
    layer: TransformerLayerSchedulePlan,
    node: Any,
    step: NodeStep,
    number: int,
    events: list[NodeEvent] | None,
) -> Callable[[Any], Any]:
    """What `step` does to the value its half has come to."""

    def call(value: Any) -> Any:
        if step.operation == "backward_dw":
            return _measured(node.backward_dw, step, number, events)
        if step.operation == "backward":
            return _measured(lambda: node.backward(value), step, number, events)
        with layer.get_low_precision_context():
            return _measured(lambda: node.forward(value), step, number, events)

    return call


def _measured(function: Callable[[], Any], step: NodeStep, layer: int, events: list[NodeEvent] | None) -> Any:
    if events is None:
        return function()
    start = time.perf_counter()
    result = function()
    events.append(NodeEvent(step, layer, start, time.perf_counter()))
    return result


def _result(value: Any) -> Any:
    return value.result() if isinstance(value, Future) else value


def _may_run_beside(*plans: TransformerModelChunkSchedulePlan) -> bool:
    """Whether no communicating node uses Megatron's random state, which only one thread may at a time."""
    layers = [layer for plan in plans for layer in plan._transformer_layers]
    return not any(
        layer.config.hidden_dropout > 0
        or (isinstance(layer.layer, MultiTokenPredictionLayer) and layer.config.sequence_parallel)
        for layer in layers
    )
