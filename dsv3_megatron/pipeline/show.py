"""Draw a schedule: `python -m dsv3_megatron.pipeline.show dualpipe --ranks 8 --microbatches 20`.

Prints the timeline and its figures, among them what the messages cost where they share one communication stream, as
on NCCL, and writes the picture (SVG, PNG) and a Chrome/Perfetto trace (JSON).
With `--trace FILE` it draws the timelines of a file instead, such as one that was measured.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from dsv3_megatron.errors import Parser

from .actions import Schedule
from .build import SCHEDULES, ZIGZAG, build_schedule, zigzag_budget, zigzag_lower_bound
from .fit import read_costs
from .nccl import TAIL, simulate_one_stream
from .picture import draw, text
from .simulate import Costs, Simulation, simulate
from .trace import read_trace, write_trace
from .validate import validate


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="dsv3 schedule", description=__doc__.split("\n")[0])
    parser.add_argument("schedule", choices=SCHEDULES, nargs="?", help="schedule to build and simulate")
    parser.add_argument("--ranks", type=int, default=8, help="pipeline ranks (default 8)")
    parser.add_argument(
        "--microbatches", type=int, default=20, help="microbatches, all directions (default 20)"
    )
    parser.add_argument("--model-chunks", type=int, help="chunks per rank, interleaved only (default 2)")
    zigzag = parser.add_argument_group("zigzag only")
    zigzag.add_argument("--chunks", type=int, help="stages per rank: 2 (default), 4, ...")
    zigzag.add_argument(
        "--memory-cap", type=float, help="the most a rank holds, in chunks (default chunks·ranks + 2)"
    )
    zigzag.add_argument(
        "--deferred",
        type=float,
        help="what waiting weight gradients hold, in chunks (default 1; DeepSeek-V3: 1.8)",
    )
    zigzag.add_argument("--alpha", type=float, help="how many pairs are split at the end (default: the best)")
    parser.add_argument(
        "--costs",
        type=Path,
        help="a file that --profile-pipeline wrote, instead of --f, --b, --w, --fb and --p2p",
    )
    for name, meaning in (
        ("f", "forward"),
        ("b", "full backward"),
        ("w", "weight gradients"),
        ("fb", "overlapped pair"),
        ("p2p", "message between ranks"),
    ):
        default = getattr(Costs(), name)
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{meaning} (default {default})")
    parser.add_argument(
        "--message",
        type=float,
        default=0.05,
        help="for the last lines: a message on one communication stream, in units of a forward (default 0.05)",
    )
    parser.add_argument(
        "--tail",
        type=float,
        default=TAIL,
        help="for the last lines: what still runs when the results of a pair or backward have left, in units of the "
        f"weight gradients (default {TAIL}: those of one layer's attention, in a stage of four)",
    )
    parser.add_argument("--trace", type=Path, help="draw the timelines of this trace file instead")
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="folder for the files (default .)")
    parser.add_argument("--text-only", action="store_true", help="write no files")
    args = parser.parse_args(argv)
    if (args.schedule is None) == (args.trace is None):
        parser.error("give either a schedule or --trace FILE")
    if args.trace is not None:
        others = set(vars(args)) - {"trace", "schedule", "output_dir", "text_only"}
        given = sorted(name for name in others if getattr(args, name) != parser.get_default(name))
        if given:
            parser.error(f"--{given[0].replace('_', '-')} is for a schedule: leave it out beside --trace")
    if args.costs is not None:
        for name in ("f", "b", "w", "fb", "p2p", "message", "tail"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(
                    f"--{name} would do nothing beside --costs, whose file says all times: leave it out"
                )
    try:
        if not args.text_only:
            args.output_dir.mkdir(parents=True, exist_ok=True)
        _show_trace(args) if args.trace else _show_schedule(args)
    except ValueError as error:
        parser.error(_in_options(str(error)))
    except BrokenPipeError:
        raise  # the reader has read enough: cli.py
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}; use another path")


_OPTIONS = {
    "num_ranks": "ranks",
    "num_microbatches": "microbatches",
    "num_model_chunks": "model-chunks",
    "memory_cap": "memory-cap",
    "chunks": "chunks",
    "deferred": "deferred",
    "alpha": "alpha",
}
_ARGUMENT = re.compile(rf"\b({'|'.join(_OPTIONS)}|f|b|w|fb|p2p|message|tail)=")
_LATER = re.compile(rf"(?<![\w-])({'|'.join(_OPTIONS)})(?=·| out\b)|num_(ranks|microbatches|model_chunks)\b")


def _in_options(text: str) -> str:
    """An error of the functions behind this command, with the command's options for their arguments."""
    if text.startswith("costs="):
        return "--costs " + text.removeprefix("costs=")  # the rest is of the file
    text = _ARGUMENT.sub(lambda match: f"--{_OPTIONS.get(match[1], match[1])} ", text)
    return _LATER.sub(lambda match: f"--{_OPTIONS[match[0]]}", text)


def _show_schedule(args: argparse.Namespace) -> None:
    if not any((args.f, args.b, args.fb)):
        raise ValueError("f=0, b=0 and fb=0: nothing takes time; give one of them a duration")
    costs = Costs(f=args.f, b=args.b, w=args.w, fb=args.fb, p2p=args.p2p)
    schedule = build_schedule(
        args.schedule,
        args.ranks,
        args.microbatches,
        num_model_chunks=args.model_chunks,
        chunks=args.chunks,
        memory_cap=args.memory_cap,
        deferred=args.deferred,
        alpha=args.alpha,
        costs=(args.costs or costs) if args.schedule == ZIGZAG else None,
    )
    if args.costs:
        costs = read_costs(args.costs, schedule.num_stages)
    on_one_stream = None if args.costs else _on_one_stream(schedule, args)
    validate(schedule)
    simulation = simulate(schedule, costs)
    print(text(simulation.events, colour=_use_colour()))
    title = f"{schedule.name}: {args.ranks} ranks, {schedule.num_stages} stages, "
    title += f"{args.microbatches} microbatches"
    worst = max(simulation.bubble)
    print(
        f"{title}; makespan {simulation.makespan:g}, bubble {min(simulation.bubble):g} to {worst:g} "
        f"({worst / simulation.makespan:.1%}), peak in flight {max(simulation.peak_in_flight)}"
    )
    if schedule.name == ZIGZAG:
        print(_against_bound(simulation, costs, args))
    if on_one_stream is not None:
        print(on_one_stream)
    if not args.text_only:
        name = f"{schedule.name}_{args.ranks}x{args.microbatches}"
        unit = "as in the file of costs" if args.costs else "units of one forward"
        _write(args.output_dir, name, {title: simulation.events}, unit, 1000)


def _against_bound(simulation: Simulation, costs: Costs, args: argparse.Namespace) -> str:
    """How far a zigzag is from what no table can beat, and what it holds of its cap."""
    schedule = simulation.schedule
    chunks = schedule.num_stages // schedule.num_ranks
    memory = {"memory_cap": args.memory_cap, "deferred": args.deferred}
    bound = zigzag_lower_bound(args.ranks, args.microbatches, chunks, costs, **memory)
    budget = zigzag_budget(args.ranks, chunks, **memory)
    peak = max(budget.peaks(schedule.ranks, schedule.num_stages))
    return (
        f"lower bound {bound:g}, ratio {simulation.makespan / bound:.4f}; peak memory {peak:g} of {budget.cap:g} "
        f"chunks, waiting weight gradients counted ({budget.deferred:g} each)"
    )


def _on_one_stream(schedule: Schedule, args: argparse.Namespace) -> str:
    """What messages of `args.message` forwards cost: their own time, and with all of a rank's on one stream."""
    if not 0 <= args.message < inf:
        raise ValueError(f"message={args.message} is not a duration; use a number ≥ 0")
    free = Costs(f=args.f, b=args.b, w=args.w, fb=args.fb)
    timed = replace(free, p2p=args.message * args.f)
    if not 0 <= args.tail < inf:
        raise ValueError(f"tail={args.tail} is not a duration; use a number ≥ 0")
    base = simulate(schedule, free).makespan
    one_stream = simulate_one_stream(schedule, timed, args.tail * args.w).makespan
    late = simulate_one_stream(schedule, timed).makespan
    many_streams = simulate(schedule, timed).makespan
    return (
        f"one communication stream, messages of {args.message:g} F: makespan {one_stream:g}, "
        f"{one_stream / base - 1:+.2%} of the {base:g} with free messages\n"
        f"  where results leave only at the end of their action: {late / base - 1:+.2%}, of which "
        f"{many_streams / base - 1:+.2%} with a stream for each message"
    )


def _show_trace(args: argparse.Namespace) -> None:
    for name, events in read_trace(args.trace).items():
        print(f"{name}\n{text(events, colour=_use_colour())}")
        if not args.text_only:
            stem = f"{args.trace.stem}_{name.replace(' ', '_')}"
            _write(args.output_dir, stem, {name: events}, "seconds", None)


def _write(folder: Path, name: str, timelines: dict, unit: str, microseconds: float | None) -> None:
    paths = [folder / f"{name}{suffix}" for suffix in (".svg", ".png")]
    for title, events in timelines.items():
        draw(events, title, paths, unit)
    if microseconds is not None:
        paths.append(folder / f"{name}.json")
        write_trace(paths[-1], timelines, microseconds)
    print("wrote " + ", ".join(str(path) for path in paths))


def _use_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


if __name__ == "__main__":
    main()
