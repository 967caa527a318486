"""DualPipe against interleaved 1F1B with overlap: `python -m dsv3_megatron.pipeline.compare`.

Simulates every schedule on the same model twice: on the same ranks, and with the same number of stages.
Prints the tables of `docs/dualpipe.md`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dsv3_megatron.errors import Parser

from .build import ZIGZAG, build_schedule, zigzag_budget, zigzag_lower_bound
from .nominal import V3_COSTS, V3_DEFERRED
from .simulate import Costs, simulate


class Row(NamedTuple):
    """One schedule on one number of ranks.

    Attributes:
        parameters: per rank, in `num_stages`-ths of the model.
        activations: peak per rank, in microbatches through one `num_stages`-th of the model.
        memory: the same with waiting weight gradients counted, `V3_DEFERRED` each.
        step: in the unit of the costs.
        bubble: of the worst rank, as a share of the step.
        bound: the step over zigzag's lower bound; None for the others.
    """

    schedule: str
    ranks: int
    stages: int
    parameters: float
    activations: float
    memory: float
    step: float
    bubble: float
    bound: float | None = None


def compare(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    num_model_chunks: int | None = None,
    costs: dict[str, float] = V3_COSTS,
    num_stages: int = 16,
    memory: float | None = None,
) -> Row:
    """Simulate `name`; `costs` are those of one `num_stages`-th of the model, whatever the schedule's stages
    are.

    num_model_chunks, memory: of a zigzag its chunks, and its cap in activations of one `num_stages`-th (default:
        DualPipe's `num_stages` + 1).
    """
    bound = None
    if name == ZIGZAG:
        chunks = num_model_chunks or 2
        length = num_stages / (chunks * num_ranks)
        cap = (num_stages + 1 if memory is None else memory) / length
        scaled = Costs(**{key: cost * length for key, cost in costs.items()})
        schedule = build_schedule(
            name,
            num_ranks,
            num_microbatches,
            chunks=chunks,
            costs=scaled,
            memory_cap=cap,
            deferred=V3_DEFERRED,
        )
        bound = zigzag_lower_bound(num_ranks, num_microbatches, chunks, scaled, cap, V3_DEFERRED)
    else:
        schedule = build_schedule(name, num_ranks, num_microbatches, num_model_chunks=num_model_chunks)
        length = num_stages / schedule.num_stages
    simulation = simulate(schedule, Costs(**{key: cost * length for key, cost in costs.items()}))
    held = zigzag_budget(num_ranks, 2, 0, V3_DEFERRED).peaks(schedule.ranks, schedule.num_stages)
    return Row(
        name if num_model_chunks is None else f"{name}, {num_model_chunks} chunks",
        num_ranks,
        schedule.num_stages,
        len(schedule.stages_of(0)) * length,
        max(simulation.peak_in_flight) * length,
        max(held) * length,
        simulation.makespan,
        max(simulation.bubble) / simulation.makespan,
        None if bound is None else simulation.makespan / bound,
    )


def same_ranks(num_ranks: int = 16, num_microbatches: int = 128) -> list[Row]:
    """The same model and batch on the same ranks."""
    rows = [compare(name, num_ranks, num_microbatches) for name in ("1f1b", "zb1p", "dualpipe", "dualpipev")]
    rows += [compare("interleaved_1f1b_overlap", num_ranks, num_microbatches, chunks) for chunks in (2, 4)]
    return rows + [compare(ZIGZAG, num_ranks, num_microbatches, chunks) for chunks in (2, 4)]


def same_stages(num_stages: int = 16, num_microbatches: int = 128) -> list[Row]:
    """The same parameters per rank: DualPipe holds each stage twice on `num_stages` ranks, the others once on half
    as many, zigzag also in halves.

    Two pipelines of the half-size layouts fill the ranks of one DualPipe, each with half of the microbatches.
    """
    half = num_stages // 2
    return [
        compare("dualpipe", num_stages, num_microbatches),
        compare("dualpipev", half, num_microbatches // 2),
        compare("interleaved_1f1b_overlap", half, num_microbatches // 2, 2),
        compare(ZIGZAG, half, num_microbatches // 2, 2),
        compare(ZIGZAG, half, num_microbatches // 2, 4),
    ]


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = [
        "| schedule | ranks | stages | parameters/16 | activations/16 | with waiting W | step, s | bubble | "
        "over bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.schedule} | {row.ranks} | {row.stages} | {row.parameters:g} | {row.activations:g} | "
            f"{row.memory:.4g} | {row.step / 1000:.2f} | {row.bubble:.1%} | "
            f"{'' if row.bound is None else f'{row.bound:.3f}'} |"
        )
    return "\n".join(lines)


def report(num_microbatches: int) -> str:
    """Both tables for 16 ranks, with their headings."""
    return (
        f"Same 16 ranks, {num_microbatches} microbatches:\n\n{table(same_ranks(16, num_microbatches))}\n\n"
        f"Same parameters per rank, {num_microbatches} microbatches on 16 ranks:\n\n"
        f"{table(same_stages(16, num_microbatches))}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="dsv3 compare")
    parser.add_argument(
        "--microbatches", type=int, nargs="+", default=[32, 128], help="per pipeline of 16 ranks"
    )
    args = parser.parse_args(argv)
    try:
        for num_microbatches in args.microbatches:
            print(report(num_microbatches))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
