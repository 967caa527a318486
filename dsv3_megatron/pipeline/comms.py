"""The messages between ranks, derived from a table.

A message travels on a channel: a payload (activations or their gradients), from one rank to another. Channels
are one-way and first in, first out. Forward of one direction and backward of the other travel the same way
with the same shape, so they need channels of their own.

Who posts what and when is `operations.py`; here is the order that all ranks agree on.
"""

from itertools import groupby
from math import inf
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
    """Sends and receives that a rank posts together."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


def blocking_program(simulation: Simulation) -> list[list[Action | Batch]]:
    """Every rank's program when messages go in batches, one batch after the other: batches between the actions.

    A send holds its rank until the receiver has posted the receive, so receives cannot simply stand before the action
    that uses them: around the turning points of DualPipe two ranks would wait for each other. Both ends therefore post
    a message at the moment at which it comes into being in the simulation, which is one order for all ranks. So no
    rank ever waits for another in a circle, even if each item of its program had to end before the next one starts.

    What comes into being at one moment is ordered by when it is used, and only what agrees in both is one batch: a
    batch ends when its last message does, and what is urgent must not wait for what is not (ZB1P's step is 3% longer
    if it does).

    Of the simulation's costs only p2p may be zero, and it must be.
    """
    schedule = simulation.schedule
    used = {
        message: event.start for event in simulation.events for message in receives(schedule, event.action)
    }
    items: list[list[tuple[float, float, Action | Message]]] = [[] for _ in schedule.ranks]
    for event in simulation.events:
        items[event.rank].append((event.start, inf, event.action))
        for message in sends(schedule, event.action):
            # It stands before the action that starts as it arrives.
            for rank in (message.channel.source, message.channel.destination):
                items[rank].append((event.end, used[message], message))
    return [_program(rank, sorted(own, key=lambda item: item[:2])) for rank, own in enumerate(items)]


def _program(rank: int, items: list[tuple[float, float, Action | Message]]) -> list[Action | Batch]:
    program: list[Action | Batch] = []
    for (_, use), equal in groupby(items, key=lambda item: item[:2]):
        group = [item for *_, item in equal]
        if use == inf:
            program += [item for item in group if isinstance(item, Action)]
            continue
        messages = [item for item in group if isinstance(item, Message)]
        program.append(
            Batch(
                tuple(message for message in messages if message.channel.source == rank),
                tuple(message for message in messages if message.channel.destination == rank),
            )
        )
    return program
