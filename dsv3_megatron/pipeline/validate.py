"""Checks that a table is a correct schedule, whoever wrote it."""

from collections import deque
from dataclasses import dataclass

from .actions import Action, Kind, Schedule, peak_in_flight
from .comms import Batch, Message, blocking_program, channel_orders, receives, sends
from .device import Deadlock
from .nccl import WORST, run_on_nccl
from .simulate import simulate


class ScheduleError(ValueError):
    """A table that would compute something wrong, or hang; the message names rank and action."""


@dataclass(frozen=True)
class Validation:
    """What the checks saw.

    Attributes:
        peak_in_flight: per rank, the most microbatch-stages whose activations it holds.
        peak_weight_queue: per rank, the most input-only backwards that wait for their W.
        num_messages: sent between ranks in one step.
    """

    peak_in_flight: tuple[int, ...]
    peak_weight_queue: tuple[int, ...]
    num_messages: int


def validate(schedule: Schedule, max_in_flight: int | None = None) -> Validation:
    """Check a schedule completely.

    - every (stage, microbatch) has one F, and one B or one input-only B with its W, on the rank that holds
      the stage for that direction, in this order; weight gradients run first in, first out, and none is left
      at the end;
    - the ranks never wait for each other in a circle, also when p2p is blocking and batched, and on NCCL whatever a
      step meets there (the worst of `nccl.CONDITIONS`);
    - on every channel the two ends have the messages in the same order;
    - no rank holds more than `max_in_flight` microbatch-stages, if given.

    Raises:
        ScheduleError: at the first violation.
    """
    queues = tuple(_check_rank(schedule, rank) for rank in range(schedule.num_ranks))
    _check_complete(schedule)
    num_messages = _check_channels(schedule)
    try:
        simulation = simulate(schedule)
    except ValueError as error:
        raise ScheduleError(str(error)) from None
    check_blocking(schedule, blocking_program(simulation))
    try:
        run_on_nccl(schedule)
    except Deadlock as error:
        raise ScheduleError(f"deadlock on NCCL with {WORST}: {error}") from None
    peaks = tuple(peak_in_flight(actions) for actions in schedule.ranks)
    if max_in_flight is not None and max(peaks) > max_in_flight:
        rank = peaks.index(max(peaks))
        raise ScheduleError(
            f"rank {rank} holds {peaks[rank]} microbatches in flight, more than {max_in_flight}"
        )
    return Validation(peaks, queues, num_messages)


def _check_rank(schedule: Schedule, rank: int) -> int:
    """Placement, and the order F, B, W of each stage and microbatch; returns the peak of the weight queue."""
    forwards: set[tuple[int, int]] = set()
    backwards: set[tuple[int, int]] = set()
    queue: deque[tuple[int, int]] = deque()
    peak = 0
    for action in schedule.ranks[rank]:
        for part in action.parts:
            where = f"rank {rank}, {part} (microbatch@stage)"
            if not (0 <= part.stage < schedule.num_stages and 0 <= part.direction < schedule.num_directions):
                raise ScheduleError(f"{where}: no stage {part.stage} in direction {part.direction}")
            if part.microbatch not in schedule.microbatches_of(part.direction):
                raise ScheduleError(f"{where}: not a microbatch of direction {part.direction}")
            if schedule.rank_of(part.stage, part.direction) != rank:
                raise ScheduleError(
                    f"{where}: stage {part.stage} of direction {part.direction} is held by rank "
                    f"{schedule.rank_of(part.stage, part.direction)}"
                )
            key = (part.stage, part.microbatch)
            if part.kind is Kind.F:
                if key in forwards:
                    raise ScheduleError(f"{where}: runs twice")
                forwards.add(key)
            elif part.kind is Kind.W:
                if not queue or queue[0] != key:
                    expected = f"W{queue[0][1]}@{queue[0][0]}" if queue else "none: the queue is empty"
                    raise ScheduleError(
                        f"{where}: weight gradients are first in, first out; next is {expected}"
                    )
                queue.popleft()
            else:
                if key not in forwards:
                    raise ScheduleError(f"{where}: runs before its forward")
                if key in backwards:
                    raise ScheduleError(f"{where}: runs twice")
                backwards.add(key)
                if part.kind is Kind.B_INPUT:
                    queue.append(key)
                    peak = max(peak, len(queue))
    if forwards != backwards:
        stage, microbatch = min(forwards - backwards)
        raise ScheduleError(f"rank {rank}: F{microbatch}@{stage} has no backward")
    if queue:
        raise ScheduleError(f"rank {rank}: {len(queue)} weight gradients are left at the end")
    return peak


def _check_complete(schedule: Schedule) -> None:
    present = {
        (part.stage, part.microbatch)
        for actions in schedule.ranks
        for action in actions
        for part in action.parts
        if part.kind is Kind.F
    }
    for direction in range(schedule.num_directions):
        for microbatch in schedule.microbatches_of(direction):
            for stage in range(schedule.num_stages):
                if (stage, microbatch) not in present:
                    rank = schedule.rank_of(stage, direction)
                    raise ScheduleError(f"rank {rank}: F{microbatch}@{stage} is missing")


def _check_channels(schedule: Schedule) -> int:
    num_messages = 0
    for channel, order in channel_orders(schedule).items():
        if order.sent != order.received:
            place, sent, received = next(
                (i, s, r) for i, (s, r) in enumerate(zip(order.sent, order.received, strict=False)) if s != r
            )
            raise ScheduleError(
                f"{channel.payload} channel from rank {channel.source} to rank {channel.destination}: "
                f"message {place} is sent for microbatch {sent.microbatch}, stage {sent.stage}, but used for "
                f"microbatch {received.microbatch}, stage {received.stage}"
            )
        num_messages += len(order.sent)
    return num_messages


def check_blocking(schedule: Schedule, programs: list[list[Action | Batch]]) -> None:
    """Execute programs of actions and batches, every message a rendezvous.

    A rank leaves a batch only when each of its messages is posted at the other end too.

    Raises:
        ScheduleError: the ranks stand still, an action runs without its input, or a message is sent before it
            exists.
    """
    position = [0] * len(programs)
    posted: set[tuple[int, Message]] = set()  # (rank, message)
    available: list[set[Message]] = [set() for _ in programs]  # produced or received, by rank

    def post(rank: int) -> None:
        """Post the batch at which `rank` stands."""
        batch = programs[rank][position[rank]]
        assert isinstance(batch, Batch)
        for message in batch.sends:
            if message not in available[rank]:
                raise ScheduleError(f"rank {rank} sends before it has it: {message}")
        posted.update((rank, message) for message in (*batch.sends, *batch.receives))

    def advance(rank: int) -> bool:
        """Finish the item at which `rank` stands, if possible."""
        item = programs[rank][position[rank]]
        if isinstance(item, Batch):
            others = [(message.channel.destination, message) for message in item.sends]
            others += [(message.channel.source, message) for message in item.receives]
            if any(other not in posted for other in others):
                return False
            available[rank].update(item.receives)
        else:
            for message in receives(schedule, item):
                if message not in available[rank]:
                    raise ScheduleError(f"rank {rank}: {item} starts without its {message}")
            available[rank].update(sends(schedule, item))
        position[rank] += 1
        if position[rank] < len(programs[rank]) and isinstance(programs[rank][position[rank]], Batch):
            post(rank)
        return True

    unfinished = {rank for rank, program in enumerate(programs) if program}
    for rank in unfinished:
        if isinstance(programs[rank][0], Batch):
            post(rank)
    moved = True
    while unfinished and moved:
        moved = False
        for rank in sorted(unfinished):
            while position[rank] < len(programs[rank]) and advance(rank):
                moved = True
            if position[rank] == len(programs[rank]):
                unfinished.discard(rank)
    if unfinished:
        stuck = "; ".join(f"rank {rank} at {programs[rank][position[rank]]}" for rank in sorted(unfinished))
        raise ScheduleError(f"deadlock under blocking p2p: {stuck}")
