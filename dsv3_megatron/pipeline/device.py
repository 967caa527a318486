"""Devices that execute what their hosts enqueue: streams, hardware queues, kernels that wait for other ranks.

A small model of what CUDA and NCCL do with the order in which a host issues its work, on a clock:

- A host runs its program instantly, and stands still where it waits: for ranks that must come together
  (`Rendezvous`), or for its device (`HostWait`).
- A launch goes to a stream, and streams to hardware queues. A queue hands its launches to the device strictly in the
  order in which they were issued: one that is not ready yet (the one before it on its stream, or one that it needs, has
  not ended) holds up all behind it, of whatever stream. With `CUDA_DEVICE_MAX_CONNECTIONS=1` all streams share one
  queue.
- A launch that meets others (a message, a collective) is resident from its start: it occupies its place on the device,
  and spins until the launch at the other end of each meeting is resident too.
"""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


class Deadlock(RuntimeError):
    """Nothing can move any more; the message says where each rank stands."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel.

    Attributes:
        stream: runs its launches one after the other.
        needs: earlier launches of the rank, by their place in its program, that must have ended (events).
        duration: from its start; of one that meets others, from the moment at which all ends of a meeting are there.
        meetings: names of what it takes part in; every launch with the same name, on any rank, is an end of it. One
            that has a single end never takes place.
        what: for messages.
    """

    stream: Hashable
    needs: tuple[int, ...] = ()
    duration: float = 0
    meetings: tuple[Hashable, ...] = ()
    what: object = None


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The host waits until each rank that has this name in its program has come to it: a communicator's first use."""

    name: Hashable


@dataclass(frozen=True, slots=True)
class HostWait:
    """The host waits until these launches of its rank have ended; None: until its device has nothing left to do."""

    needs: tuple[int, ...] | None = None


Instruction = Launch | Rendezvous | HostWait


@dataclass(frozen=True)
class Device:
    """What all ranks have.

    Attributes:
        queues: hardware queues, over which streams are dealt in the order of their first use; None: one per stream.
        residents: launches that may wait for other ranks at the same time (each occupies multiprocessors); None: any
            number.
    """

    queues: int | None = None
    residents: int | None = None


def execute(
    programs: Sequence[Sequence[Instruction]], device: Device | None = None
) -> list[dict[int, float]]:
    """Run a program per rank to the end.

    Returns:
        Per rank, when each of its launches ended, by place in the program.

    Raises:
        Deadlock: not all of them can.
    """
    return _Execution(programs, device or Device()).run()


@dataclass
class _Rank:
    program: Sequence[Instruction]
    position: int = 0
    outstanding: int = 0
    residents: int = 0
    queues: list[deque[int]] = field(default_factory=list)
    queue_of: dict[Hashable, deque[int]] = field(default_factory=dict)
    last_of: dict[Hashable, int] = field(default_factory=dict)  # stream to its latest launch
    before: dict[int, int] = field(default_factory=dict)  # launch to the one before it on its stream
    ended: dict[int, float] = field(default_factory=dict)
    unmet: dict[int, int] = field(default_factory=dict)  # resident launch to its open meetings


class _Execution:
    def __init__(self, programs: Sequence[Sequence[Instruction]], device: Device) -> None:
        self.device = device
        self.ranks = [_Rank(program) for program in programs]
        instructions = [instruction for program in programs for instruction in program]
        self.ends = Counter(name for one in instructions if isinstance(one, Launch) for name in one.meetings)
        self.expected = Counter(one.name for one in instructions if isinstance(one, Rendezvous))
        self.present: defaultdict[Hashable, list[tuple[int, int]]] = defaultdict(list)  # (rank, launch)
        self.arrived: defaultdict[Hashable, list[int]] = defaultdict(list)
        self.now = 0.0
        self.moments: list[
            tuple[float, int, int, int, Hashable]
        ] = []  # time, tie-break, rank, launch, meeting
        self.count = 0
        self.dirty: deque[int] = deque(range(len(programs)))

    def run(self) -> list[dict[int, float]]:
        while True:
            while self.dirty:
                self.advance(self.dirty.popleft())
            if not self.moments:
                break
            self.now, _, rank, launch, meeting = heapq.heappop(self.moments)
            if rank >= 0:
                self.end(rank, launch)
            else:
                self.met(meeting)
        stuck = [
            f"rank {number} {self.where(rank)}"
            for number, rank in enumerate(self.ranks)
            if rank.position < len(rank.program) or rank.outstanding
        ]
        if stuck:
            raise Deadlock("; ".join(stuck))
        return [rank.ended for rank in self.ranks]

    def advance(self, number: int) -> None:
        rank = self.ranks[number]
        while self.advance_host(rank, number) | self.advance_device(rank, number):
            pass

    def advance_host(self, rank: _Rank, number: int) -> bool:
        begin = rank.position
        while rank.position < len(rank.program):
            instruction = rank.program[rank.position]
            if isinstance(instruction, Launch):
                self.enqueue(rank, instruction)
            elif isinstance(instruction, HostWait):
                if instruction.needs is None:
                    if rank.outstanding:
                        break
                elif any(launch not in rank.ended for launch in instruction.needs):
                    break
            elif not self.all_here(instruction.name, number):
                break
            rank.position += 1
        return rank.position > begin

    def all_here(self, name: Hashable, number: int) -> bool:
        arrived = self.arrived[name]
        if number not in arrived:
            arrived.append(number)
            if len(arrived) == self.expected[name]:
                self.dirty.extend(other for other in arrived if other != number)
        return len(arrived) == self.expected[name]

    def enqueue(self, rank: _Rank, launch: Launch) -> None:
        stream = launch.stream
        if stream not in rank.queue_of:
            if self.device.queues is None or len(rank.queues) < self.device.queues:
                rank.queues.append(deque())
                rank.queue_of[stream] = rank.queues[-1]
            else:
                rank.queue_of[stream] = rank.queues[len(rank.queue_of) % self.device.queues]
        rank.queue_of[stream].append(rank.position)
        if stream in rank.last_of:
            rank.before[rank.position] = rank.last_of[stream]
        rank.last_of[stream] = rank.position
        rank.outstanding += 1

    def advance_device(self, rank: _Rank, number: int) -> bool:
        moved = False
        for queue in rank.queues:
            while queue and self.starts(rank, number, queue[0]):
                queue.popleft()
                moved = True
        return moved

    def starts(self, rank: _Rank, number: int, place: int) -> bool:
        """Start the launch at the head of a queue, if it is ready."""
        launch = rank.program[place]
        assert isinstance(launch, Launch)
        ended = rank.ended
        if place in rank.before and rank.before[place] not in ended:
            return False
        for needed in launch.needs:
            if needed not in ended:
                return False
        if not launch.meetings:
            self.at(self.now + launch.duration, number, place)
            return True
        if rank.residents == self.device.residents:
            return False
        rank.residents += 1
        rank.unmet[place] = len(launch.meetings)
        for name in launch.meetings:
            present = self.present[name]
            present.append((number, place))
            if len(present) == self.ends[name] > 1:
                self.at(self.now + launch.duration, -1, -1, name)
        return True

    def at(self, time: float, rank: int, launch: int, meeting: Hashable = None) -> None:
        self.count += 1
        heapq.heappush(self.moments, (time, self.count, rank, launch, meeting))

    def met(self, meeting: Hashable) -> None:
        for number, place in self.present.pop(meeting):
            rank = self.ranks[number]
            rank.unmet[place] -= 1
            if rank.unmet[place] == 0:
                del rank.unmet[place]
                rank.residents -= 1
                self.end(number, place)

    def end(self, number: int, place: int) -> None:
        rank = self.ranks[number]
        rank.ended[place] = self.now
        rank.outstanding -= 1
        self.dirty.append(number)

    def where(self, rank: _Rank) -> str:
        spinning = [str(rank.program[place].what) for place in sorted(rank.unmet)]  # type: ignore[union-attr]
        held = [str(rank.program[queue[0]].what) for queue in rank.queues if queue]  # type: ignore[union-attr]
        parts = []
        if rank.position < len(rank.program):
            at = rank.program[rank.position]
            parts.append(f"host at {at.name if isinstance(at, Rendezvous) else 'a wait for the device'}")
        if spinning:
            parts.append(f"resident: {', '.join(spinning)}")
        if held:
            parts.append(f"held up: {', '.join(held)}")
        return ", ".join(parts)
