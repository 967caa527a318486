"""The messages between ranks, derived from a table.

A message travels on a channel: a payload (activations or their gradients), from one rank to another. Channels
are one-way and first in, first out. Forward of one direction and backward of the other travel the same way
with the same shape, so they need channels of their own; on NCCL each channel class is a communicator of its
own.
"""

from typing import Literal, NamedTuple

from .actions import Action, Kind, Schedule
from .simulate import Simulation

Payload = Literal["activation", "gradient"]


class Channel(NamedTuple):
    """A one-way queue between two ranks of the pipeline."""

    payload: Payload
    source: int
    destination: int


class Message(NamedTuple):
    """The input of `stage` (activation), or the gradient of its output (gradient), for one microbatch."""

    channel: Channel
    stage: int  # the stage that uses it
    direction: int
    microbatch: int

    def __str__(self) -> str:
        return (
            f"{self.channel.payload} for stage {self.stage}, direction {self.direction}, "
            f"microbatch {self.microbatch} (rank {self.channel.source} to rank {self.channel.destination})"
        )


def receives(schedule: Schedule, action: Action) -> list[Message]:
    """The messages that `action` uses: none where the neighbouring stage is on the same rank."""
    return _messages(schedule, action, incoming=True)


def sends(schedule: Schedule, action: Action) -> list[Message]:
    """The messages that `action` produces."""
    return _messages(schedule, action, incoming=False)


def _messages(schedule: Schedule, action: Action, incoming: bool) -> list[Message]:
    messages = []
    for kind, stage, direction, microbatch, _ in action.parts:
        if kind is Kind.W:
            continue
        payload: Payload = "activation" if kind is Kind.F else "gradient"
        along = 1 if kind is Kind.F else -1  # activations go up the stages, gradients down
        producer = stage - along if incoming else stage
        consumer = producer + along
        if min(producer, consumer) < 0 or max(producer, consumer) >= schedule.num_stages:
            continue
        channel = Channel(
            payload, schedule.rank_of(producer, direction), schedule.rank_of(consumer, direction)
        )
        if channel.source != channel.destination:
            messages.append(Message(channel, consumer, direction, microbatch))
    return messages


class ChannelOrder(NamedTuple):
    """The messages of a channel in the order of the two programs at its ends; the two must be equal."""

    sent: tuple[Message, ...]
    received: tuple[Message, ...]


def channel_orders(schedule: Schedule) -> dict[Channel, ChannelOrder]:
    """Every channel of the schedule with its messages as sent and as used."""
    sent: dict[Channel, list[Message]] = {}
    received: dict[Channel, list[Message]] = {}
    for actions in schedule.ranks:
        for action in actions:
            for message in receives(schedule, action):
                received.setdefault(message.channel, []).append(message)
            for message in sends(schedule, action):
                sent.setdefault(message.channel, []).append(message)
    return {
        channel: ChannelOrder(tuple(sent.get(channel, ())), tuple(received.get(channel, ())))
        for channel in sorted({*sent, *received})
    }


class Batch(NamedTuple):
    """Sends and receives that a rank posts together, and waits for before its next action."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


def blocking_program(simulation: Simulation) -> list[list[Action | Batch]]:
    """Every rank's program when p2p is blocking and batched: batches of messages between the actions.

    A blocking send holds its rank until the receiver has posted the receive, so receives cannot simply stand
    before the action that uses them: around the turning points of DualPipe two ranks would wait for each
    other. Both ends therefore post a message at the moment at which it comes into being in the simulation,
    which is one order for all ranks. Of the simulation's costs only p2p may be zero, and it must be.
    """
    schedule = simulation.schedule
    moments: list[list[tuple[float, int, Action | Message]]] = [[] for _ in schedule.ranks]
    for event in simulation.events:
        moments[event.rank].append((event.start, 1, event.action))
        for message in sends(schedule, event.action):
            # A message stands before the action that starts as it arrives.
            moments[message.channel.source].append((event.end, 0, message))
            moments[message.channel.destination].append((event.end, 0, message))

    programs: list[list[Action | Batch]] = []
    for rank, items in enumerate(moments):
        program: list[Action | Batch] = []
        pending: list[Message] = []
        for _, _, item in sorted(items, key=lambda moment: moment[:2]):
            if isinstance(item, Message):
                pending.append(item)
                continue
            if pending:
                program.append(_batch(rank, pending))
                pending = []
            program.append(item)
        if pending:
            program.append(_batch(rank, pending))
        programs.append(program)
    return programs


def _batch(rank: int, messages: list[Message]) -> Batch:
    return Batch(
        tuple(message for message in messages if message.channel.source == rank),
        tuple(message for message in messages if message.channel.destination == rank),
    )
