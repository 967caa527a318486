"""Do the hops run beside each other? `python -m dsv3_megatron.studies.two_hop_speed` (`make bench-dispatch`).

Processes dispatch and combine real tokens over links that sleep: each link takes the bytes it carries to others over
its bandwidth, one exchange after the other, as a wire does. One JSON line per case on stdout, progress on stderr:

- seconds: of a dispatch (or combine) on the slowest rank, best of `--repeats`;
- slower_hop_s, sum_s: what the slower link alone takes, and both one after the other;
- ratio: of seconds to slower_hop_s. With one chunk it is that of the sum; with many it nears 1.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dsv3_megatron import cpu
from dsv3_megatron.dispatch.links import Link, Links, connect
from dsv3_megatron.dispatch.route import Counts, Grid, sent
from dsv3_megatron.studies.ports import free_port
from dsv3_megatron.studies.sleeping import sleep_until, wake_on_time

TOPK = 4


class SleepingLink:
    """A link behind another one, with a bandwidth of its own: a thread carries one exchange after the other.

    Attributes:
        busy: seconds that it has slept.
    """

    def __init__(self, link: Link, rank: int, bytes_per_s: float) -> None:
        self._link, self._rank, self._rate = link, rank, bytes_per_s
        self._thread = ThreadPoolExecutor(1, initializer=wake_on_time)
        self.busy = 0.0

    def exchange(self, message: Tensor, rows_out: list[int], rows_in: list[int]) -> "_Carried":
        """See `dispatch.links.Link`."""
        rows = max(sum(r) - r[self._rank] for r in (rows_out, rows_in))
        seconds = rows * message.shape[1] * message.dtype.itemsize / self._rate
        self.busy += seconds

        def carry() -> Tensor:
            end = time.perf_counter() + seconds
            received = self._link.exchange(message, rows_out, rows_in).wait()
            sleep_until(end)
            return received

        return _Carried(self._thread.submit(carry))


class _Carried:
    def __init__(self, future: "Future[Tensor]") -> None:
        self._future = future

    def wait(self) -> Tensor:
        return self._future.result()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.two_hop_speed", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--nodes", type=int, default=2, help="default %(default)s")
    add("--ranks-per-node", type=int, default=2, help="default %(default)s")
    add("--tokens", type=int, default=800, help="of each rank (default %(default)s)")
    add("--hidden", type=int, default=256, help="default %(default)s")
    add("--chunks", type=int, nargs="+", default=[1, 10], help="default 1 10")
    add("--seconds", type=float, default=1.0, help="of the slower hop, about (default %(default)s)")
    add("--repeats", type=int, default=3, help="runs of each case; the best one counts (default %(default)s)")
    args = parser.parse_args(argv)
    cpu.activate()
    import dsv3_megatron.dispatch.hops  # noqa: F401  once, before the ranks are forked

    ranks = args.nodes * args.ranks_per_node
    mp.start_processes(_rank_main, (args, free_port()), nprocs=ranks, start_method="fork")


def _rank_main(rank: int, args: argparse.Namespace, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    wake_on_time()
    dist.init_process_group("gloo", rank=rank, world_size=args.nodes * args.ranks_per_node)
    links = connect(dist.new_group(range(dist.get_world_size())), args.ranks_per_node)
    # InfiniBand over NVLink, time of the hops: as in the report, even, and the other way round.
    for name, share in (("infiniband slower", 0.5), ("even", 1.0), ("nvlink slower", 2.0)):
        for chunks in args.chunks:
            _case(args, links, name, share, chunks)
    dist.barrier()
    dist.destroy_process_group()


def _case(args: argparse.Namespace, links: Links, name: str, share: float, chunks: int) -> None:
    """`share`: seconds of the second hop over those of the first, in a dispatch."""
    from dsv3_megatron.dispatch import hops

    ranks, rank = dist.get_world_size(), dist.get_rank()
    node, index = divmod(rank, args.ranks_per_node)
    grid = Grid(args.nodes, args.ranks_per_node, node, index, 4 * ranks, chunks)
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(args.tokens, grid.num_experts, generator=generator)
    routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(TOPK, 1).indices, True)
    lines = [torch.empty_like(Counts.own(routing_map, grid)) for _ in range(ranks)]
    dist.all_gather(lines, Counts.own(routing_map, grid))
    counts = Counts.of(torch.stack(lines), grid)
    mine = sent(routing_map, grid, counts, TOPK)
    rows = torch.randn(len(mine.token), args.hidden, generator=generator)
    weights = torch.rand(len(rows), TOPK, generator=generator)
    first, second = args.seconds / max(1.0, share), args.seconds * min(1.0, share)
    rates = _bytes_of_hops(counts, grid, args.hidden * 4)

    def run(what: str) -> tuple[float, float, float]:
        rail = SleepingLink(links.rail, node, rates[0] / first)
        inside = SleepingLink(links.node, index, rates[1] / second)
        slow = Links(rail, inside, links.num_nodes, links.node_size, links.rank)
        route = hops.Route(grid, slow, counts, mine, TOPK, fp8=False)
        pairs, _ = hops.dispatch(hops.Route(grid, links, counts, mine, TOPK, fp8=False), rows, weights)
        if what == "combine":
            known = hops.Route(grid, links, counts, mine, TOPK, fp8=False)
            hops.dispatch(known, rows, weights)
            route.gates, route.receipts = known.gates, known.receipts
        call: Callable[[], Any] = {
            "dispatch": lambda: hops.dispatch(route, rows, weights),
            "combine": lambda: hops.gather(route, pairs),
        }[what]
        dist.barrier()
        begun = time.perf_counter()
        call()
        seconds = time.perf_counter() - begun
        figures = torch.tensor([seconds, max(rail.busy, inside.busy), rail.busy + inside.busy])
        dist.all_reduce(figures, dist.ReduceOp.MAX)
        return figures[0].item(), figures[1].item(), figures[2].item()

    for what in ("dispatch", "combine"):
        if rank == 0:
            print(f"[bench] {what}, {name}, {chunks} chunks", file=sys.stderr, flush=True)
        seconds, slower, total = min(run(what) for _ in range(args.repeats))
        if rank == 0:
            figures = {"seconds": seconds, "slower_hop_s": slower, "sum_s": total, "ratio": seconds / slower}
            rounded = {key: round(value, 4) for key, value in figures.items()}
            print(json.dumps({"case": what, "links": name, "chunks": chunks, **rounded}), flush=True)


def _bytes_of_hops(counts: Counts, grid: Grid, row: int) -> tuple[float, float]:
    """Bytes of rows that the fullest rank sends to others over either link in a dispatch."""
    rail, node = [], []
    for rank in range(grid.num_ranks):
        at, index = divmod(rank, grid.node_size)
        here = Grid(grid.num_nodes, grid.node_size, at, index, grid.num_experts, grid.num_chunks)
        hops = [counts.hops(here, chunk) for chunk in range(grid.num_chunks)]
        rail.append(sum(sum(h.rail_out) - h.rail_out[at] for h in hops))
        node.append(sum(sum(h.node_out) - h.node_out[index] for h in hops))
    return max(rail) * row, max(node) * row


if __name__ == "__main__":
    main()
