"""A zigzag dealt again by what was measured: `python -m dsv3_megatron.studies.zigzag_costs` (`make bench-zigzag`).

Stages that sleep, none as long as another, each pass up to 10% shorter or longer than its stage's own time. One step is
run with the table dealt by nominal times; its timeline becomes a file of costs, as `--profile-pipeline` writes it; the
table is dealt by that file (`costs=FILE`), and the same passes are run again. The last line on stdout is JSON: seconds
of both steps, what the simulator says of both tables with the measured costs, and the ratio of the two steps.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dsv3_megatron import cpu
from dsv3_megatron.dualpipe.p2p import PipelineP2P
from dsv3_megatron.pipeline.actions import Schedule
from dsv3_megatron.pipeline.autograd_stage import AutogradStage, WeightGradients
from dsv3_megatron.pipeline.build import build_schedule
from dsv3_megatron.pipeline.fit import fit_stage_costs, read_costs, write_costs
from dsv3_megatron.pipeline.runner import PipelineRunner
from dsv3_megatron.pipeline.simulate import Event, simulate
from dsv3_megatron.pipeline.stage import Pass
from dsv3_megatron.studies.ports import free_port
from dsv3_megatron.studies.sleeping import (
    MESSAGE_DTYPE,
    MESSAGE_SHAPE,
    Durations,
    SleepingStage,
    as_one_block,
    stamped,
    wake_on_time,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.zigzag_costs", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="processes, one pipeline rank each (default 8)")
    add("--microbatches", type=int, default=20, help="default 20")
    add("--chunks", type=int, default=2, help="stages of a rank (default 2)")
    add(
        "--unit-ms", type=float, default=50, help="a middling stage's forward; its backward is 2 (default 50)"
    )
    add("--spread", type=float, default=0.4, help="stages are up to so much shorter or longer (default 0.4)")
    add("--jitter", type=float, default=0.1, help="and each pass of them (default 0.1)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        build_schedule("zigzag", args.ranks, args.microbatches, chunks=args.chunks)
    except ValueError as error:
        parser.error(str(error))
    cpu.activate()
    mp.start_processes(_rank_main, (args, free_port()), nprocs=args.ranks, start_method="fork")


def _rank_main(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    wake_on_time()
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=args.ranks)
    p2p = PipelineP2P(range(args.ranks), lambda _: (MESSAGE_SHAPE, MESSAGE_DTYPE), timeout_s=120)
    nominal = build_schedule("zigzag", args.ranks, args.microbatches, chunks=args.chunks)
    _run(nominal, rank, p2p, args, args.unit_ms / 50)  # warm: what is made or loaded at its first use
    events, before = _run(nominal, rank, p2p, args)
    folder = Path(tempfile.gettempdir())
    file = folder / f"zigzag_costs_{port}_{rank}.json"
    write_costs(file, fit_stage_costs(events, nominal.num_stages))
    again = build_schedule("zigzag", args.ranks, args.microbatches, chunks=args.chunks, costs=file)
    costs = read_costs(file)
    file.unlink()
    _, after = _run(again, rank, p2p, args)
    if rank == 0:
        line = {
            "bench": "zigzag_costs",
            "ranks": args.ranks,
            "stages": nominal.num_stages,
            "microbatches": args.microbatches,
            "unit_ms": args.unit_ms,
            "spread": args.spread,
            "jitter": args.jitter,
            "nominal_s": round(before, 4),
            "redealt_s": round(after, 4),
            "simulated_nominal_s": round(simulate(nominal, costs).makespan, 4),
            "simulated_redealt_s": round(simulate(again, costs).makespan, 4),
            "ratio": round(after / before, 4),
        }
        print(json.dumps(line), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _run(
    schedule: Schedule,
    rank: int,
    p2p: PipelineP2P,
    args: argparse.Namespace,
    unit_ms: float | None = None,
) -> tuple[list[Event], float]:
    """One step; the events of all ranks, and seconds from the common start to the last of them."""
    if unit_ms is not None:
        args = argparse.Namespace(**(vars(args) | {"unit_ms": unit_ms}))
    stages = {number: _stage(number, schedule.num_stages, args) for number, _ in schedule.stages_of(rank)}
    runner = PipelineRunner(schedule, rank, stages, p2p, overlap=as_one_block)
    dist.barrier()  # they do not deal their tables in the same time
    moment = torch.tensor([time.perf_counter() + 0.2], dtype=torch.float64)
    dist.broadcast(moment, 0)
    start = moment.item()
    time.sleep(max(0.0, start - time.perf_counter()))
    mine = runner.step(start)
    gathered: list[list[Event]] = [[] for _ in range(args.ranks)]
    dist.all_gather_object(gathered, mine)
    events = [event for of_rank in gathered for event in of_rank]
    seconds = max(event.end for event in events)
    if rank == 0:
        print(f"{seconds:.3f} s", file=sys.stderr, flush=True)
    return events, seconds


class _UnevenStage(AutogradStage):
    """A sleeping stage whose passes differ: the same for the same microbatch, in whatever order they run."""

    def __init__(self, number: int, args: argparse.Namespace, **ends: object) -> None:
        self.weight_gradients = WeightGradients()
        length = args.unit_ms / 1000 * (1 + args.spread * _number(args.seed, number))
        self.sleeping = SleepingStage(Durations(length, length, length), self.weight_gradients)
        super().__init__(self.sleeping, self.weight_gradients, **ends)  # type: ignore[arg-type]
        self.number, self.length, self.args = number, length, args

    def _jitter(self, which: Pass) -> None:
        f, i, w = (
            self.length
            * (1 + self.args.jitter * _number(self.args.seed, self.number, which.microbatch, kind))
            for kind in range(3)
        )
        self.sleeping.durations = Durations(f, i, w)

    def forward(self, which: Pass, activation: Tensor | None) -> Tensor | None:
        self._jitter(which)
        return super().forward(which, activation)

    def backward(self, which: Pass, gradient: Tensor | None) -> Tensor | None:
        self._jitter(which)
        return super().backward(which, gradient)

    def backward_input(self, which: Pass, gradient: Tensor | None) -> Tensor | None:
        self._jitter(which)
        return super().backward_input(which, gradient)


def _stage(number: int, num_stages: int, args: argparse.Namespace) -> _UnevenStage:
    return _UnevenStage(
        number,
        args,
        first_input=(lambda _: stamped()) if number == 0 else None,
        loss=(lambda output, _: output.sum()) if number == num_stages - 1 else None,
    )


def _number(*key: int) -> float:
    """From −1 to 1, the same in every process."""
    return random.Random(str(key)).uniform(-1, 1)


if __name__ == "__main__":
    main()
