"""What the hops enqueue, recorded from real ones, on the model of devices (`pipeline/device.py`)."""

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv3_megatron.pipeline.device import Deadlock, Device, Instruction, Launch, execute
from tests.harness import run_distributed

NODES, NODE_SIZE, CHUNKS, TOKENS, TOPK = 2, 2, 10, 80, 4
COMPUTE = 0.05  # seconds of a chunk's unpacking, next to 1 of an exchange


def record(rank: int, world_size: int) -> dict[str, list[Instruction]]:
    """The launches of a rank's dispatch, combine and their backward passes; an exchange is its group's collective."""
    import torch.distributed as dist

    from dsv3_megatron.dispatch import hops
    from dsv3_megatron.dispatch.links import Links, connect
    from dsv3_megatron.dispatch.route import Counts, Grid, sent

    node, index = divmod(rank, NODE_SIZE)
    real = connect(dist.new_group(range(world_size)), NODE_SIZE)
    grid = Grid(NODES, NODE_SIZE, node, index, 4 * world_size, CHUNKS)
    program: list[Instruction] = []
    numbers = itertools.count()
    waited: list[int] = []

    class Carried:
        def __init__(self, pending: Any, place: int) -> None:
            self.pending, self.place = pending, place

        def wait(self) -> torch.Tensor:
            waited.append(self.place)
            return self.pending.wait()

    class Recorded:
        def __init__(self, kind: str, link: Any, group: int) -> None:
            self.kind, self.link, self.group = kind, link, group

        def exchange(self, message: torch.Tensor, out: list[int], into: list[int]) -> Carried:
            program.append(Launch("compute", tuple(waited), COMPUTE, what="computing"))
            waited.clear()
            meeting = (self.kind, self.group, next(numbers))
            program.append(Launch(self.kind, (len(program) - 1,), 1, (meeting,), what=meeting))
            return Carried(self.link.exchange(message, out, into), len(program) - 1)

    links = Links(
        Recorded("rail", real.rail, index), Recorded("node", real.node, node), NODES, NODE_SIZE, rank
    )
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(TOKENS, grid.num_experts, generator=generator)
    routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(TOPK, 1).indices, True)
    lines = [torch.empty_like(Counts.own(routing_map, grid)) for _ in range(world_size)]
    dist.all_gather(lines, Counts.own(routing_map, grid))
    counts = Counts.of(torch.stack(lines), grid)
    mine = sent(routing_map, grid, counts, TOPK)
    route = hops.Route(grid, links, counts, mine, TOPK, fp8=False)
    rows, weights = torch.randn(len(mine.token), 8), torch.rand(len(mine.token), TOPK)
    found: dict[str, list[Instruction]] = {}

    def take(name: str) -> None:
        found[name] = list(program)
        program.clear()
        waited.clear()

    pairs, scalars = hops.dispatch(route, rows, weights)
    take("dispatch")
    back, _ = hops.gather(route, pairs)
    take("combine")
    hops.spread(route, back)
    take("combine's backward")
    hops.gather(route, pairs, scalars)
    take("dispatch's backward")
    return found


@pytest.fixture(scope="module")
def programs() -> dict[str, list[list[Instruction]]]:
    ranks = run_distributed(record, NODES * NODE_SIZE)
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def makespan(ranks: list[list[Instruction]], device: Device) -> float:
    return max(max(ended.values()) for ended in execute(ranks, device))


def uneven(ranks: list[list[Instruction]], seed: int) -> list[list[Instruction]]:
    """Ranks that compute for different times."""
    draw = random.Random(seed)
    return [
        [
            replace(one, duration=draw.random() * 3) if isinstance(one, Launch) and not one.meetings else one
            for one in rank
        ]
        for rank in ranks
    ]


@pytest.mark.parametrize(
    "device", [Device(), Device(queues=1), Device(queues=1, residents=2), Device(residents=2)]
)
def test_the_hops_end_on_any_device(programs, device):
    """With room for both hops, which the capped CTAs are for, whatever the ranks' pace."""
    for name, seed in itertools.product(programs, range(20)):
        makespan(uneven(programs[name], seed), device)


def test_two_orders_would_not_end(programs):
    """The control: one rank issues two first hops the other way round."""
    ranks = [list(rank) for rank in programs["dispatch"]]
    first, second = [
        place for place, one in enumerate(ranks[0]) if isinstance(one, Launch) and one.stream == "rail"
    ][:2]
    ranks[0][first], ranks[0][second] = (
        replace(ranks[0][first], meetings=ranks[0][second].meetings),
        replace(ranks[0][second], meetings=ranks[0][first].meetings),
    )
    with pytest.raises(Deadlock):
        makespan(ranks, Device())


def test_hops_run_beside_each_other_where_streams_have_queues_of_their_own(programs):
    """Ten seconds per hop; with one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) dispatch takes the sum."""
    for name, ranks in programs.items():
        assert makespan(ranks, Device()) < 1.15 * CHUNKS, name
    assert makespan(programs["dispatch"], Device(queues=1)) > 1.8 * CHUNKS
