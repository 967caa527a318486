"""Executes a rank's part of a schedule: the same table that is simulated and drawn."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .actions import Action, Kind, Schedule
from .comms import Message, Payload, receives, sends
from .operations import Operation, host_operations
from .simulate import Event
from .stage import Half, Messages, Overlap, Pass, Stage, one_after_the_other


@dataclass(frozen=True, slots=True)
class _Slot:
    """A pass with its ends: a message from or to another rank, or a hand-over on this rank, or neither."""

    which: Pass
    source: "Message | _Handover | None"
    target: "Message | _Handover | None"


@dataclass(frozen=True, slots=True)
class _Handover:
    """A tensor that stays on the rank, between two stages that it holds."""

    payload: Payload
    stage: int  # the stage that uses it
    microbatch: int


class Clock(Protocol):
    """Marks moments of a step, and says afterwards when they were."""

    def mark(self) -> Any:
        """This moment, for what has been issued so far."""

    def seconds(self, mark: Any) -> float:
        """When `mark` was, in seconds of one clock; asked for after the step."""


class HostClock:
    """`time.perf_counter()`: right where an action has been computed when its call returns. One clock for a host."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark


@dataclass(frozen=True, slots=True)
class _Turn:
    """An action, with the posts that stand before it and the messages that it waits for."""

    posts: tuple[Operation, ...]
    waits_for: tuple[Message, ...]
    action: Action | None  # None: the posts at the end of the step
    slots: tuple[_Slot, ...]


class PipelineRunner:
    """Runs one step of `schedule` on one rank: the operations of `host_operations`, one by one.

    Args:
        schedule: the table; the caller has validated it.
        rank: pipeline rank.
        stages: stage number to stage, for the stages that the rank holds.
        p2p: the messages; None when the schedule has a single rank.
        overlap: runs an overlapped pair.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, Stage],
        p2p: Messages | None,
        overlap: Overlap = one_after_the_other,
    ) -> None:
        held = {stage for stage, _ in schedule.stages_of(rank)}
        if held != set(stages):
            raise ValueError(f"stages={sorted(stages)}: rank {rank} of {schedule.name} holds {sorted(held)}")
        if p2p is None and schedule.num_ranks > 1:
            raise ValueError(f"p2p=None: {schedule.name} on {schedule.num_ranks} ranks needs channels")
        self.schedule = schedule
        self.rank = rank
        self._stages = stages
        self._p2p = p2p
        self._overlap = overlap
        operations = host_operations(schedule, rank) if p2p is None else p2p.operations(schedule)
        self._turns = _turns(operations, dict(_program(schedule, rank)))
        self._handed: dict[_Handover, Tensor] = {}

    def step(self, start: float | None = None, clock: Clock | None = None) -> list[Event]:
        """Run all microbatches of one step.

        Args:
            start: the moment of `clock` that measured times count from; default now.
            clock: default `HostClock`.

        Returns:
            The rank's measured events, in seconds; an event starts when its inputs are there.

        Raises:
            dsv3_megatron.dualpipe.p2p.PipelineTimeout: a message did not arrive or was not taken within the time limit.
        """
        clock = clock or HostClock()
        first = clock.mark()
        marks: list[tuple[Action, Any, Any]] = []
        if self._p2p is not None:
            self._p2p.begin()
        for turn in self._turns:
            for operation in turn.posts:
                assert self._p2p is not None
                self._p2p.post(operation)
            if turn.action is None:
                continue
            try:
                begun = self._run(turn, clock)
                marks.append((turn.action, begun, clock.mark()))
            except Exception as error:
                error.add_note(f"while pipeline rank {self.rank} ran {turn.action} (microbatch@stage)")
                raise
        if self._p2p is not None:
            self._p2p.finish()
        assert not self._handed, f"left on rank {self.rank}: {list(self._handed)}"
        if start is None:
            start = clock.seconds(first)
        return [
            Event(self.rank, clock.seconds(begun) - start, clock.seconds(end) - start, action)
            for action, begun, end in marks
        ]

    def _run(self, turn: _Turn, clock: Clock) -> Any:
        """Compute one action; returns the mark at which its inputs were there."""
        begun: list[Any] = []

        def wait() -> None:
            if begun:
                return  # a pair waits for both its messages at once
            if turn.waits_for:
                assert self._p2p is not None
                self._p2p.wait(turn.waits_for)
            begun.append(clock.mark())

        if len(turn.slots) == 2:
            self._overlap(*(self._half(slot, wait) for slot in turn.slots))
        else:
            slot = turn.slots[0]
            tensor = self._input(slot.source)
            wait()
            self._compute(slot, tensor)
        wait()  # a pair of which neither half has asked
        return begun[0]

    def _compute(self, slot: _Slot, tensor: Tensor | None) -> None:
        stage = self._stages[slot.which.action.stage]
        send = self._sender(slot)
        match slot.which.action.kind:
            case Kind.F:
                send(stage.forward(slot.which, tensor))
            case Kind.B:
                early = getattr(stage, "backward_and_send", None)
                if early is None:
                    send(stage.backward(slot.which, tensor))
                else:
                    early(slot.which, tensor, send)
            case Kind.B_INPUT:
                send(stage.backward_input(slot.which, tensor))
            case Kind.W:
                stage.backward_weight(slot.which)

    def _half(self, slot: _Slot, wait: Callable[[], None]) -> Half:
        tensor = self._input(slot.source)

        def receive() -> Tensor | None:
            wait()
            return tensor

        return Half(self._stages[slot.which.action.stage], slot.which, tensor, receive, self._sender(slot))

    def _input(self, source: Message | _Handover | None) -> Tensor | None:
        """The tensor that the input is in, or will be once waited for."""
        if isinstance(source, Message):
            assert self._p2p is not None
            return self._p2p.buffer(source)
        return None if source is None else self._handed.pop(source)

    def _sender(self, slot: _Slot) -> Callable[[Tensor | None], None]:
        def send(tensor: Tensor | None) -> None:
            target = slot.target
            if target is None:
                return
            if tensor is None:
                raise RuntimeError(
                    f"{slot.which.action} (microbatch@stage) must return a tensor for its neighbour, got None"
                )
            if isinstance(target, Message):
                assert self._p2p is not None
                self._p2p.send(target, tensor)
            else:
                self._handed[target] = tensor.detach()

        return send


def _turns(operations: Sequence[Operation], slots: Mapping[Action, tuple[_Slot, ...]]) -> list[_Turn]:
    turns = []
    posts: list[Operation] = []
    waits_for: tuple[Message, ...] = ()
    for operation in operations:
        if operation.action is not None:
            turns.append(_Turn(tuple(posts), waits_for, operation.action, slots[operation.action]))
            posts, waits_for = [], ()
        elif operation.kind == "wait":
            waits_for = operation.receives
        else:
            posts.append(operation)
    return [*turns, _Turn(tuple(posts), (), None, ())]


def _program(schedule: Schedule, rank: int) -> list[tuple[Action, tuple[_Slot, ...]]]:
    """The rank's actions with the ends of each part, and marks on the first forward and last gradient of a
    stage."""
    parts = [part for action in schedule.ranks[rank] for part in action.parts]
    first_forward: dict[int, Action] = {}
    last_gradient: dict[int, Action] = {}
    for part in parts:
        if part.kind is Kind.F:
            first_forward.setdefault(part.stage, part)
        elif part.kind is not Kind.B_INPUT:
            last_gradient[part.stage] = part

    def slot(part: Action) -> _Slot:
        marks = Pass(part, first_forward.get(part.stage) == part, last_gradient.get(part.stage) == part)
        return _Slot(marks, _source(schedule, part), _target(schedule, part))

    return [(action, tuple(slot(part) for part in action.parts)) for action in schedule.ranks[rank]]


def _source(schedule: Schedule, part: Action) -> Message | _Handover | None:
    messages = receives(schedule, part)
    if messages:
        return messages[0]
    if part.kind is Kind.F:
        return _Handover("activation", part.stage, part.microbatch) if part.stage > 0 else None
    if part.kind is not Kind.W and part.stage < schedule.num_stages - 1:
        return _Handover("gradient", part.stage, part.microbatch)
    return None


def _target(schedule: Schedule, part: Action) -> Message | _Handover | None:
    messages = sends(schedule, part)
    if messages:
        return messages[0]
    if part.kind is Kind.F:
        following = part.stage + 1
        return (
            _Handover("activation", following, part.microbatch) if following < schedule.num_stages else None
        )
    if part.kind is not Kind.W and part.stage > 0:
        return _Handover("gradient", part.stage - 1, part.microbatch)
    return None
