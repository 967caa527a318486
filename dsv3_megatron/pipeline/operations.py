"""What a rank issues in one step, in order: posts, waits and actions, derived from the schedule's table.

The runner and the messages (`dsv3_megatron.dualpipe.p2p`) are driven by these lists, the model of NCCL (`nccl.py`)
executes them, and a recorded step of either backend is compared with them.
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .actions import Action, Schedule
from .comms import Batch, Channel, Message, blocking_program, receives, sends
from .simulate import simulate

Backend = Literal["nccl", "gloo"]
BACKENDS: tuple[Backend, ...] = ("nccl", "gloo")
RECEIVES_AHEAD = 2  # gloo: receives kept posted on each channel


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a rank issues.

    Attributes:
        kind: "batch": sends and receives posted together (NCCL: a group); "isend", "irecv": one message posted (gloo);
            "wait": what follows uses these messages; "compute": an action.
        sends: messages that a batch or isend sends.
        receives: messages that a batch or irecv receives, or that a wait waits for.
        action: of a compute.
    """

    kind: Literal["batch", "isend", "irecv", "wait", "compute"]
    sends: tuple[Message, ...] = ()
    receives: tuple[Message, ...] = ()
    action: Action | None = None

    def __str__(self) -> str:
        if self.action is not None:
            return f"{self.kind} {self.action}"
        ends = [f"send {message}" for message in self.sends]
        ends += [f"receive {message}" for message in self.receives]
        return f"{self.kind} ({'; '.join(ends)})"


def host_operations(
    schedule: Schedule, rank: int, backend: Backend = "nccl", receives_ahead: int = RECEIVES_AHEAD
) -> list[Operation]:
    """What `rank` issues in one step of `schedule`, in order.

    A wait stands right before the action that uses its messages: on NCCL the device waits there, on gloo the host.

    - "nccl": batches in the order of `comms.blocking_program`, on one communicator. It has no deadlock even if each
      operation had to end before the next one starts, so that nothing depends on what a device runs side by side.
      (NCCL promises nothing for two operations in flight on one device.)
    - "gloo": receives are posted `receives_ahead` deep on each channel, the next one before a wait for the channel, and
      each result is sent when it is there: a send is then never anybody's wait. (A pair's results may leave while it
      still runs; in the list they stand behind it.)

    Args:
        schedule: any table that `simulate` can execute, of training or forward only.
        receives_ahead: gloo only, at least 1.

    Raises:
        ValueError: an unknown backend or rank, fewer than 1 receive ahead, or a table that cannot finish.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: use one of {', '.join(BACKENDS)}")
    if not 0 <= rank < schedule.num_ranks:
        raise ValueError(f"rank={rank}: the schedule's ranks are 0 to {schedule.num_ranks - 1}")
    if receives_ahead < 1:
        raise ValueError(f"receives_ahead={receives_ahead}: at least 1 receive must be posted")
    if backend == "gloo":
        return _ahead(schedule, rank, receives_ahead)
    operations: list[Operation] = []
    for item in _batched(schedule)[rank]:
        if isinstance(item, Batch):
            operations.append(Operation("batch", item.sends, item.receives))
        else:
            operations += _with_its_wait(schedule, item)
    return operations


@lru_cache(maxsize=4)
def _batched(schedule: Schedule) -> list[list[Action | Batch]]:
    """All ranks' programs: they come out of one simulation (nominal costs: every rank must find the same order)."""
    return blocking_program(simulate(schedule))


def _ahead(schedule: Schedule, rank: int, receives_ahead: int) -> list[Operation]:
    to_post: defaultdict[Channel, deque[Message]] = defaultdict(deque)
    for action in schedule.ranks[rank]:
        for message in receives(schedule, action):
            to_post[message.channel].append(message)
    operations: list[Operation] = []

    def post(channel: Channel) -> None:
        if to_post[channel]:
            operations.append(Operation("irecv", receives=(to_post[channel].popleft(),)))

    for channel in sorted(to_post):
        for _ in range(receives_ahead):
            post(channel)
    for action in schedule.ranks[rank]:
        for message in receives(schedule, action):
            post(message.channel)
        operations += _with_its_wait(schedule, action)
        operations += [Operation("isend", (message,)) for message in sends(schedule, action)]
    return operations


def _with_its_wait(schedule: Schedule, action: Action) -> list[Operation]:
    needed = tuple(receives(schedule, action))
    waits = [Operation("wait", receives=needed)] if needed else []
    return [*waits, Operation("compute", action=action)]
