"""Executed against simulated time: `python -m dsv3_megatron.studies.pipeline_speed` (`make bench-pipeline`).

Eight processes run every schedule with the trainer's runner and real p2p over gloo, on stages that sleep for
their declared time; Megatron's own 1F1B runs on the same stages. One JSON line per case on stdout, progress
on stderr:

- executed_s: from the common start to the end of the last rank, the best of `repeats_s`; simulated_s: the
  makespan of the simulator;
- ratio_to_simulated: of the two; ratio_to_megatron_1f1b: executed against Megatron's 1F1B in the same case.

All schedules train the same model on the same ranks: where a rank holds two stages of one direction
(dualpipev, interleaved_1f1b_overlap, zigzag), a stage is half as long. The last lines are the
runner's own cost per action, with stages that do nothing.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dsv3_megatron import cpu
from dsv3_megatron.dualpipe.p2p import PipelineP2P
from dsv3_megatron.pipeline.actions import Schedule
from dsv3_megatron.pipeline.autograd_stage import AutogradStage, WeightGradients
from dsv3_megatron.pipeline.build import INTERLEAVED, SCHEDULES, ZIGZAG, build_schedule
from dsv3_megatron.pipeline.runner import PipelineRunner
from dsv3_megatron.pipeline.simulate import Costs, simulate
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

MEGATRON_1F1B = "megatron_1f1b"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_megatron.studies.pipeline_speed", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="processes, one pipeline rank each (default 8)")
    add("--microbatches", type=int, nargs="+", default=[20, 48], help="per step (default 20 48)")
    add("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), help="default all")
    add("--unit-ms", type=float, default=100, help="milliseconds of F; B is 2, W 1, F&B 3 (default 100)")
    add("--p2p", type=float, nargs="+", default=[0, 0.25], help="latencies, in units (default 0 0.25)")
    add("--repeats", type=int, default=1, help="runs of each case; the best one counts (default 1)")
    args = parser.parse_args(argv)
    try:
        for name in args.schedules:
            for num_microbatches in args.microbatches:
                _build(name, args.ranks, num_microbatches)
    except ValueError as error:
        parser.error(str(error))
    cpu.activate()
    # Once, before the ranks are forked; Megatron's schedule imports the second in the middle of a step.
    import megatron.core.pipeline_parallel.schedules
    import megatron.core.transformer.multi_token_prediction  # noqa: F401

    mp.start_processes(_rank_main, (args, free_port()), nprocs=args.ranks, start_method="fork")


def _rank_main(rank: int, args: argparse.Namespace, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    wake_on_time()
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    p2p = PipelineP2P(range(args.ranks), lambda _: (MESSAGE_SHAPE, MESSAGE_DTYPE), timeout_s=120)
    bench = _Bench(rank, args, p2p)
    for num_microbatches in args.microbatches:
        for latency in args.p2p:
            bench.speed(num_microbatches, latency)
    bench.overhead("scheduler_overhead_with_p2p", build_schedule("dualpipe", args.ranks, 8 * args.ranks), p2p)
    if rank == 0:
        bench.overhead("scheduler_overhead_one_rank", build_schedule("dualpipev", 1, 200), None)
    dist.barrier()
    dist.destroy_process_group()


class _Bench:
    """One rank's side of the measurements; rank 0 prints."""

    def __init__(self, rank: int, args: argparse.Namespace, p2p: PipelineP2P) -> None:
        self.rank = rank
        self.args = args
        self.p2p = p2p
        self.unit = args.unit_ms / 1000

    def speed(self, num_microbatches: int, latency: float) -> None:
        """Every schedule at one number of microbatches and one link latency (in units)."""
        baseline = self._case(MEGATRON_1F1B, "1f1b", num_microbatches, latency, None)
        for name in self.args.schedules:
            self._case(name, name, num_microbatches, latency, baseline)

    def _case(
        self, label: str, name: str, num_microbatches: int, latency: float, baseline: float | None
    ) -> float:
        schedule = _build(name, self.args.ranks, num_microbatches, latency)
        share = _share(schedule)
        costs = Costs(f=share, b=2 * share, w=share, fb=3 * share, p2p=latency)
        simulated = simulate(schedule, costs).makespan * self.unit
        self._progress(f"{label}, {num_microbatches} microbatches, p2p {latency:g}: about {simulated:.1f} s")
        if label == MEGATRON_1F1B:
            times = [self._run_megatron(schedule, latency) for _ in range(self.args.repeats)]
        else:
            times = [self._run(schedule, share, latency) for _ in range(self.args.repeats)]
        executed = min(times)
        self._print(
            case=label,
            ranks=schedule.num_ranks,
            stages=schedule.num_stages,
            microbatches=num_microbatches,
            unit_ms=self.args.unit_ms,
            costs={"f": share, "b": 2 * share, "w": share, "fb": 3 * share, "p2p": latency},
            repeats_s=[round(seconds, 4) for seconds in times],
            executed_s=round(executed, 4),
            simulated_s=round(simulated, 4),
            ratio_to_simulated=round(executed / simulated, 4),
            ratio_to_megatron_1f1b=1.0 if baseline is None else round(executed / baseline, 4),
        )
        return executed

    def _run(self, schedule: Schedule, share: float, latency: float) -> float:
        stages = {}
        for number, direction in schedule.stages_of(self.rank):
            weight_gradients = WeightGradients()
            module = SleepingStage(
                self._durations(schedule, number, direction, share, latency), weight_gradients
            )
            is_last = number == schedule.num_stages - 1
            stages[number] = AutogradStage(
                module,
                weight_gradients,
                first_input=(lambda _: stamped()) if number == 0 else None,
                loss=(lambda output, _: output.sum()) if is_last else None,
            )
        runner = PipelineRunner(schedule, self.rank, stages, self.p2p, overlap=as_one_block)
        start = self._common_start()
        events = runner.step(start)
        return self._latest(events[-1].end)

    def _durations(
        self, schedule: Schedule, stage: int, direction: int, share: float, latency: float
    ) -> Durations:
        """Of a stage, with a latency on each side where a neighbour is on another rank."""

        def link(neighbour: int) -> float:
            inside = 0 <= neighbour < schedule.num_stages
            return (
                latency * self.unit if inside and schedule.rank_of(neighbour, direction) != self.rank else 0.0
            )

        length = share * self.unit
        return Durations(length, length, length, link(stage - 1), link(stage + 1))

    def _run_megatron(self, schedule: Schedule, latency: float) -> float:
        """Megatron's `forward_backward_pipelining_without_interleaving` on the same stages."""
        from megatron.core import ModelParallelConfig
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
        from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
        from megatron.core.process_groups_config import ProcessGroupCollection

        config = ModelParallelConfig(
            pipeline_model_parallel_size=schedule.num_ranks, pipeline_dtype=MESSAGE_DTYPE
        )
        config.hidden_size = MESSAGE_SHAPE[2]
        durations = self._durations(schedule, self.rank, 0, 1.0, latency)
        model = _MegatronStage(durations, config)

        def forward_step(data_iterator: Any, model: _MegatronStage) -> tuple[Tensor, Any]:
            return model(stamped()), lambda output: (output.sum(), {})

        alone = [dist.new_group([rank]) for rank in range(schedule.num_ranks)][self.rank]
        groups = ProcessGroupCollection(tp=alone, cp=alone, pp=dist.group.WORLD)
        communicator = P2PCommunicator(dist.group.WORLD, config)
        start = self._common_start()
        forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=iter(()),
            model=model,
            num_microbatches=schedule.num_microbatches,
            seq_length=MESSAGE_SHAPE[0],
            micro_batch_size=MESSAGE_SHAPE[1],
            p2p_communicator=communicator,
            pg_collection=groups,
        )
        return self._latest(time.perf_counter() - start)

    def overhead(self, case: str, schedule: Schedule, p2p: PipelineP2P | None) -> None:
        """Microseconds of runner per action of this rank, with stages that return at once."""
        rank = self.rank if p2p is not None else 0
        message = torch.zeros(MESSAGE_SHAPE, dtype=MESSAGE_DTYPE)
        stages = {number: _EmptyStage(message) for number, _ in schedule.stages_of(rank)}
        runner = PipelineRunner(schedule, rank, stages, p2p)
        best = float("inf")
        for _ in range(5):
            if p2p is not None:
                dist.barrier()
            start = time.perf_counter()
            runner.step()
            best = min(best, time.perf_counter() - start)
        microseconds = best / len(schedule.ranks[rank]) * 1e6
        self._print(
            case=case,
            schedule=schedule.name,
            ranks=schedule.num_ranks,
            microbatches=schedule.num_microbatches,
            us_per_action=round(microseconds, 1),
        )

    def _common_start(self) -> float:
        """A moment shortly ahead at which all ranks start."""
        moment = torch.zeros(1, dtype=torch.float64)
        dist.barrier()
        if self.rank == 0:
            moment[0] = time.perf_counter() + 0.1
        dist.broadcast(moment, 0)
        start = moment.item()
        time.sleep(max(0.0, start - time.perf_counter()))
        return start

    @staticmethod
    def _latest(seconds: float) -> float:
        value = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    def _progress(self, text: str) -> None:
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _print(self, **line: Any) -> None:
        if self.rank == 0:
            print(json.dumps({"bench": "pipeline"} | line), flush=True)


class _MegatronStage(SleepingStage):
    """A sleeping stage with what Megatron's schedule asks of a model."""

    def __init__(self, durations: Durations, config: Any) -> None:
        super().__init__(durations, WeightGradients())
        self.config = config
        self._input: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self._input = tensors[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self._input is None else self._input)


class _EmptyStage:
    """Does nothing, for the overhead of the runner alone."""

    def __init__(self, message: Tensor) -> None:
        self._message = message

    def forward(self, which: Pass, activation: Tensor | None) -> Tensor:
        return self._message

    def backward(self, which: Pass, gradient: Tensor | None) -> Tensor:
        return self._message

    backward_input = backward

    def backward_weight(self, which: Pass) -> None:
        pass


def _build(name: str, num_ranks: int, num_microbatches: int, latency: float = 0) -> Schedule:
    """The schedule; the interleaved one with the smallest group of microbatches that Megatron accepts.

    latency: in units of F, what a zigzag is dealt by beside the times of its stages, which are half of those.
    """
    if name == ZIGZAG:
        return build_schedule(name, num_ranks, num_microbatches, costs=Costs(p2p=2 * latency))
    if name != INTERLEAVED:
        return build_schedule(name, num_ranks, num_microbatches)
    for group in range(num_ranks, num_microbatches + 1):
        if num_microbatches % group == 0 or num_microbatches % group >= num_ranks:
            break
    return build_schedule(name, num_ranks, num_microbatches, microbatch_group_size=group)


def _share(schedule: Schedule) -> float:
    """Length of a stage, so that every schedule trains the same model on the same ranks."""
    return schedule.num_ranks / schedule.num_stages


if __name__ == "__main__":
    main()
