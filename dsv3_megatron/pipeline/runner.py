"""Executes a rank's part of a schedule: the same table that is simulated and drawn."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .actions import Action, Kind, Schedule
from .comms import Channel, Message, Payload, channel_orders, receives, sends
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


class PipelineRunner:
    """Runs one step of `schedule` on one rank.

    Args:
        schedule: the table; the caller has validated it.
        rank: pipeline rank.
        stages: stage number to stage, for the stages that the rank holds.
        p2p: the channels; None when the schedule has a single rank.
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
        self._program = _program(schedule, rank)
        self._receives: dict[Channel, tuple[Message, ...]] = {
            channel: order.received
            for channel, order in channel_orders(schedule).items()
            if channel.destination == rank
        }
        self._handed: dict[_Handover, Tensor] = {}

    def step(
        self, start: float | None = None, finish_action: Callable[[], None] = lambda: None
    ) -> list[Event]:
        """Run all microbatches of one step.

        Args:
            start: the `time.perf_counter()` that measured times count from; default now. It is one clock for
                the processes of a host.
            finish_action: called at the end of each action; in a measured step on a GPU, where the action has only
                been launched, it waits for the device.

        Returns:
            The rank's measured events, in seconds; an event starts when its (first) input is there.

        Raises:
            dsv3_megatron.dualpipe.p2p.PipelineTimeout: a message did not arrive or was not taken within the time limit.
        """
        start = time.perf_counter() if start is None else start
        if self._p2p is not None:
            self._p2p.begin(self._receives)
        events: list[Event] = []
        for action, slots in self._program:
            try:
                begun = self._run(slots)
                finish_action()
            except Exception as error:
                error.add_note(f"while pipeline rank {self.rank} ran {action} (microbatch@stage)")
                raise
            events.append(Event(self.rank, begun - start, time.perf_counter() - start, action))
        if self._p2p is not None:
            self._p2p.finish()
        assert not self._handed, f"left on rank {self.rank}: {list(self._handed)}"
        return events

    def _run(self, slots: tuple[_Slot, ...]) -> float:
        """Compute one action; returns the moment at which its input was there."""
        if len(slots) == 2:
            forward, backward = (self._half(slot) for slot in slots)
            first_input = forward.receive()
            begun = time.perf_counter()
            self._overlap(Half(forward.stage, forward.which, lambda: first_input, forward.send), backward)
            return begun
        slot = slots[0]
        stage = self._stages[slot.which.action.stage]
        tensor = self._take(slot.source)
        begun = time.perf_counter()
        result: Tensor | None = None
        match slot.which.action.kind:
            case Kind.F:
                result = stage.forward(slot.which, tensor)
            case Kind.B:
                result = stage.backward(slot.which, tensor)
            case Kind.B_INPUT:
                result = stage.backward_input(slot.which, tensor)
            case Kind.W:
                stage.backward_weight(slot.which)
        self._give(slot.target, result, slot.which)
        return begun

    def _half(self, slot: _Slot) -> Half:
        return Half(
            self._stages[slot.which.action.stage],
            slot.which,
            lambda: self._take(slot.source),
            lambda tensor: self._give(slot.target, tensor, slot.which),
        )

    def _take(self, source: Message | _Handover | None) -> Tensor | None:
        if isinstance(source, Message):
            assert self._p2p is not None
            return self._p2p.receive(source)
        return None if source is None else self._handed.pop(source)

    def _give(self, target: Message | _Handover | None, tensor: Tensor | None, which: Pass) -> None:
        if target is None:
            return
        if tensor is None:
            raise RuntimeError(
                f"{which.action} (microbatch@stage) must return a tensor for its neighbour, got None"
            )
        if isinstance(target, Message):
            assert self._p2p is not None
            self._p2p.send(target, tensor)
        else:
            self._handed[target] = tensor.detach()


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
