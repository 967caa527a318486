"""`--profile-pipeline N`: what the pipeline ranks did, and when, in training step N."""

import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.dualpipe.pair_orders import NodeEvent
from dsv3_megatron.dualpipe.pair_picture import draw_pairs
from dsv3_megatron.pipeline.actions import Schedule
from dsv3_megatron.pipeline.fit import fit_costs, fit_stage_costs, write_costs
from dsv3_megatron.pipeline.picture import draw
from dsv3_megatron.pipeline.simulate import Event, Simulation, simulate
from dsv3_megatron.pipeline.trace import Span, write_trace


class EventClock:
    """Marks moments of the current stream by CUDA events, without a wait; a `Clock` of the pipeline runner.

    (On CPU the events are stand-ins that keep the time.)

    Attributes:
        start: `time.perf_counter()` at which the device, being idle, came to the clock's first event.
    """

    def __init__(self) -> None:
        self._first = self.mark()
        self.start = time.perf_counter()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        """On `time.perf_counter()`; waits for the device, so only after the step."""
        mark.synchronize()
        return self.start + self._first.elapsed_time(mark) / 1e3


@dataclass
class StepProfile:
    """Records one step of the first pipeline (the one that global rank 0 belongs to) and writes its timeline.

    Written are `pipeline_step<N>.json` with two timelines in the format of `pipeline.trace`, "measured" and "simulated"
    (the same table with the median duration of each kind of action), and `pipeline_step<N>.png` and `.svg`, the picture
    of the measured one. Where pairs overlap on CPU, their nodes are in the JSON too, and `pipeline_step<N>_pairs.png`
    shows those of the first pairs. (On a GPU the nodes are only issued here: a profiler shows when they ran.)
    `pipeline_step<N>_costs.json` holds the times of each stage, in seconds: what `--pipeline-costs` reads.

    Attributes:
        iteration: training step, counted from 1.
        folder: where to write.
    """

    iteration: int
    folder: Path
    _group: Any = None
    _start: float = field(default=0.0, init=False)

    @classmethod
    def from_args(cls, args: Any) -> "StepProfile | None":
        """As the options say; None without `--profile-pipeline`."""
        if args.profile_pipeline is None:
            return None
        folder = args.profile_pipeline_dir or args.tensorboard_dir or args.save
        return cls(args.profile_pipeline, Path(folder))

    def is_due(self, ranks: list[int]) -> bool:
        """Whether the step that begins is the one, and the pipeline of these global ranks the first."""
        from megatron.training import get_args

        return ranks[0] == 0 and get_args().curr_iteration + 1 == self.iteration

    def join(self, ranks: list[int]) -> None:
        """Make the group of the first pipeline, `ranks`; called by all ranks of the job, whose groups must agree."""
        self._group = dist.new_group(ranks, backend="gloo")

    def begin(self) -> "EventClock":
        """Let the ranks of the pipeline start together, with idle devices."""
        torch.cuda.synchronize()
        dist.barrier(self._group)
        clock = EventClock()
        self._start = clock.start
        return clock

    def finish(self, schedule: Schedule, events: list[Event], nodes: list[NodeEvent]) -> None:
        """Gather the ranks' events, which count from `begin`'s moment, and write the files on rank 0.

        On one host the ranks share a clock; elsewhere their times count from the barrier in `begin`.
        """
        rank = events[0].rank
        spans = [
            Span(rank, node.lane, str(node), node.start - self._start, node.end - self._start)
            for node in nodes
        ]
        mine = (socket.gethostname(), self._start, events, spans)
        gathered: list[Any] | None = [None] * self._group.size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, gathered, dst=0, group=self._group)
        if gathered is None:
            return
        one_host = len({host for host, *_ in gathered}) == 1
        first = min(start for _, start, *_ in gathered)
        all_events: list[Event] = []
        all_spans: list[Span] = []
        for _, start, rank_events, rank_spans in gathered:
            shift = start - first if one_host else 0.0
            all_events += [e._replace(start=e.start + shift, end=e.end + shift) for e in rank_events]
            all_spans += [replace(s, start=s.start + shift, end=s.end + shift) for s in rank_spans]
        self._write(Simulation(schedule, tuple(all_events)), all_spans)

    def _write(self, measured: Simulation, spans: list[Span]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        schedule = measured.schedule
        simulated = simulate(schedule, fit_costs(measured.events))
        stem = self.folder / f"pipeline_step{self.iteration}"
        trace = stem.with_suffix(".json")
        timelines = {"measured": measured.events, "simulated": simulated.events}
        write_trace(trace, timelines, microseconds_per_unit=1e6, spans=spans)
        costs = stem.with_name(f"{stem.name}_costs.json")
        write_costs(costs, fit_stage_costs(measured.events, schedule.num_stages))
        title = f"{schedule.name}, {schedule.num_ranks} pipeline ranks, step {self.iteration}: measured"
        pictures = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
        most = max(len(actions) for actions in schedule.ranks)
        draw(measured.events, title, pictures, "seconds", inches=min(max(12.0, 0.5 * most), 48.0))
        if spans:
            pictures.append(stem.with_name(f"{stem.name}_pairs.png"))
            draw_pairs(spans, f"step {self.iteration}: inside the first overlapped pairs", pictures[-1])
        idle = max(measured.bubble) / measured.makespan
        print(
            f"> pipeline step {self.iteration}: {measured.makespan:.3f} s measured, {simulated.makespan:.3f} s "
            f"simulated with the median times of its actions; a rank waits at most {idle:.0%} of the step; "
            f"wrote {trace}, {costs.name} and {', '.join(picture.name for picture in pictures)}",
            flush=True,
        )
