"""What NCCL does with a schedule's messages: whether the step can hang, and how long it takes.

`host_operations` is executed on the model of `device.py` under everything that is known to stop pipelines on GPUs:

- a communicator is made when it is first used, and its ranks wait there for each other;
- the operations of a communicator run in the order in which they were posted, a batch as one kernel that ends when
  all its messages have met their other ends;
- all streams of a device may share one hardware queue (`CUDA_DEVICE_MAX_CONNECTIONS=1`);
- the host may wait for the whole device after an action (a timer, a profiler, the caching allocator that is out of
  memory, a kernel that is loaded when first used);
- a kernel that waits for its other end occupies multiprocessors, and only so many fit beside each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from .actions import Kind, Schedule
from .comms import Message
from .device import Device, HostWait, Instruction, Launch, Rendezvous, execute
from .operations import Operation, host_operations
from .simulate import Costs, Durations, Event, Simulation

MESSAGES, COMPUTE = "messages", "compute"  # streams
# DeepSeek-V3's attention holds 187 of the 583 million parameters that a token meets in a layer: in a stage of four
# layers, its weight gradients in one of them are this part of the stage's.
TAIL = 0.08


@dataclass(frozen=True)
class Conditions:
    """What a step may meet.

    Attributes:
        device: queues and kernels beside each other, see `device.Device`.
        wait_for_device: the host waits for the whole device after each action. Waiting after some of them only takes
            constraints away.
    """

    device: Device = field(default_factory=Device)
    wait_for_device: bool = False

    def __str__(self) -> str:
        queues, residents = self.device.queues, self.device.residents
        parts = [
            f"{queues or 'as many'} hardware queue{'' if queues == 1 else 's'}{'' if queues else ' as streams'}"
        ]
        if residents:
            parts.append(f"room for {residents} waiting kernel{'' if residents == 1 else 's'}")
        if self.wait_for_device:
            parts.append("a wait for the device after each action")
        return ", ".join(parts)


# Each alone, and the worst: all at once.
CONDITIONS = (
    Conditions(),
    Conditions(Device(queues=1)),
    Conditions(Device(residents=1)),
    Conditions(wait_for_device=True),
    Conditions(Device(queues=1, residents=1), wait_for_device=True),
)
WORST = CONDITIONS[-1]


def run_on_nccl(
    schedule: Schedule,
    operations: Sequence[Sequence[Operation]] | None = None,
    conditions: Conditions = WORST,
    costs: Costs | None = None,
    tail: float = 0,
    made_before: bool = False,
) -> Simulation:
    """Execute one step of all ranks.

    Args:
        operations: by rank; default `host_operations`. An isend or irecv goes, as in torch, to a communicator of its
            two ranks (one for each payload and way), made at its first use, and the host waits for what it waits for:
            what receives posted ahead do on NCCL.
        costs: `p2p` is what a batch takes once all its ends are there, the longest of its messages (they move at once).
        tail: of a pair or a full backward, what still runs when its results have left: the last layer's weight
            gradients of attention, which Megatron keeps for this.
        made_before: two-rank communicators are there before the step.

    Raises:
        device.Deadlock: the ranks stand still; the message says where.
        ValueError: a tail that is no duration.
    """
    if not 0 <= tail < inf:
        raise ValueError(f"tail={tail} is not a duration; use a number ≥ 0")
    if operations is None:
        operations = [host_operations(schedule, rank) for rank in range(schedule.num_ranks)]
    durations = Durations(costs or Costs(), schedule.num_stages)
    hosts = [_Host(schedule, durations, conditions, tail, made_before) for _ in operations]
    programs = [host.program(issued) for host, issued in zip(hosts, operations, strict=True)]
    ends = execute(programs, conditions.device)
    events = []
    for rank, (host, ended) in enumerate(zip(hosts, ends, strict=True)):
        for place, operation in host.computed:
            assert operation.action is not None
            end = ended[place]
            events.append(Event(rank, end - durations.duration(operation.action), end, operation.action))
    return Simulation(schedule, tuple(events))


def simulate_one_stream(schedule: Schedule, costs: Costs, tail: float = 0) -> Simulation:
    """The step with all messages of a rank on one stream, in the order of `host_operations`, and nothing in the way."""
    return run_on_nccl(schedule, conditions=Conditions(), costs=costs, tail=tail)


class _Host:
    """Turns what a rank issues into a program for its device."""

    def __init__(
        self,
        schedule: Schedule,
        durations: Durations,
        conditions: Conditions,
        tail: float,
        made_before: bool,
    ) -> None:
        self.schedule = schedule
        self.durations = durations
        self.conditions = conditions
        self.tail = tail
        self.made_before = made_before
        self.instructions: list[Instruction] = []
        self.computed: list[tuple[int, Operation]] = []  # last launch of an action
        self.used: set[object] = set()  # communicators
        self.made: dict[
            tuple[Kind, int, int], int
        ] = {}  # a pass, to the launch behind which its result is there
        self.posted: dict[Message, int] = {}  # a received message, to its launch
        self.unbatched: set[Message] = set()
        self.needed: tuple[int, ...] = ()  # what the coming action waits for

    def program(self, operations: Sequence[Operation]) -> list[Instruction]:
        steps: dict[str, Callable[[Operation], None]] = {
            "batch": self.batch,
            "isend": self.single,
            "irecv": self.single,
            "wait": self.wait,
            "compute": self.compute,
        }
        for operation in operations:
            steps[operation.kind](operation)
        return self.instructions

    def launch(self, launch: Launch) -> int:
        self.instructions.append(launch)
        return len(self.instructions) - 1

    def batch(self, operation: Operation) -> None:
        self.first_use("the pipeline's communicator")
        self.post(MESSAGES, operation)

    def single(self, operation: Operation) -> None:
        (message,) = (*operation.sends, *operation.receives)
        payload, *ends = message.channel
        pair = (payload, ends[0] < ends[1], *sorted(ends))
        if not self.made_before:
            self.first_use(pair)
        self.post(pair, operation)
        self.unbatched.update(operation.receives)

    def first_use(self, communicator: object) -> None:
        if communicator not in self.used:
            self.used.add(communicator)
            self.instructions.append(Rendezvous(communicator))

    def post(self, stream: object, operation: Operation) -> None:
        messages = (*operation.sends, *operation.receives)
        place = self.launch(
            Launch(
                stream,
                needs=tuple(self.made[_producer(message)] for message in operation.sends),
                duration=max(self.durations.edge(_producer(message)) for message in messages),
                meetings=messages,
                what=operation,
            )
        )
        self.posted |= dict.fromkeys(operation.receives, place)

    def wait(self, operation: Operation) -> None:
        self.needed = tuple(self.posted[message] for message in operation.receives)
        if self.unbatched.issuperset(operation.receives):
            self.instructions.append(HostWait(self.needed))

    def compute(self, operation: Operation) -> None:
        action = operation.action
        assert action is not None
        duration = self.durations.duration(action)
        tail = min(self.tail, duration) if action.kind in (Kind.PAIR, Kind.B) else 0
        place = self.launch(Launch(COMPUTE, self.needed, duration - tail, what=operation))
        self.needed = ()
        for part in action.parts:
            kind = Kind.B if part.kind is Kind.B_INPUT else part.kind
            self.made[kind, part.stage, part.microbatch] = place
        if tail:
            place = self.launch(Launch(COMPUTE, duration=tail, what=operation))
        self.computed.append((place, operation))
        if self.conditions.wait_for_device:
            self.instructions.append(HostWait())


def _producer(message: Message) -> tuple[Kind, int, int]:
    """The pass whose result it is: of the stage before, or for a gradient of the stage behind."""
    if message.channel.payload == "activation":
        return (Kind.F, message.stage - 1, message.microbatch)
    return (Kind.B, message.stage + 1, message.microbatch)
