"""`--pipeline-schedule` and its relatives: the options, their defaults, and what they do to validated arguments."""

from argparse import ArgumentParser, Namespace
from typing import Any

from dsv3_megatron.dualpipe.active import activate
from dsv3_megatron.dualpipe.ranks import Placement
from dsv3_megatron.pipeline.nominal import nominal_options
from dsv3_megatron.pipeline.placement import layer_layout, layers_per_stage
from dsv3_megatron.pipeline.traits import TRAITS

SCHEDULES = tuple(TRAITS)
ZIGZAG_OPTIONS = {  # of the table, by argument
    "pipeline_zigzag_chunks": "chunks",
    "pipeline_zigzag_memory_cap": "memory_cap",
    "pipeline_zigzag_deferred": "deferred",
    "pipeline_costs": "costs",
}
PAIR_ORDERS = ("megatron", "report")  # the keys of overlap.ORDERS


def add_arguments(parser: ArgumentParser) -> None:
    """Add our pipeline options to Megatron's parser."""
    group = parser.add_argument_group("dsv3 pipeline schedule")
    group.add_argument(
        "--pipeline-schedule",
        choices=SCHEDULES,
        default="1f1b",
        help="1f1b: Megatron's own (interleaved with its virtual stages); zb1p: 1F1B with weight gradients in the "
        "bubble; dualpipe: bidirectional, each stage on two ranks; dualpipev: the same on half the ranks; zigzag: V's "
        "like dualpipev's, with weight gradients dealt under a memory cap",
    )
    group.add_argument(
        "--pipeline-zigzag-chunks",
        type=int,
        choices=TRAITS["zigzag"].chunks_choice,
        help="stages of a rank under zigzag, a V for each two (default 2)",
    )
    group.add_argument(
        "--pipeline-zigzag-memory-cap",
        type=float,
        help="zigzag: the most that a rank holds, in activations of a microbatch in one stage, waiting weight "
        "gradients counted (default: stages of a rank x pipeline ranks + 1 for each V, which is DualPipe's memory)",
    )
    group.add_argument(
        "--pipeline-zigzag-deferred",
        type=float,
        help="zigzag: what weight gradients that wait hold, against the activations of their stage (default 1.8, "
        "DeepSeek-V3 on Transformer Engine)",
    )
    group.add_argument(
        "--pipeline-costs",
        metavar="FILE",
        help="zigzag: deal weight gradients by these measured times: pipeline_stepN_costs.json, which "
        "--profile-pipeline N wrote (default: DeepSeek-V3's F 49, B 107, W 32, F&B 144)",
    )
    group.add_argument(
        "--pipeline-timeout-s",
        type=float,
        default=600.0,
        help="a pipeline message that takes longer ends the run with an error that names it",
    )
    group.add_argument(
        "--pipeline-max-ctas",
        type=int,
        default=2,  # as p2p.MAX_CTAS
        help="on NCCL, the most thread blocks of a pipeline message's kernel: while it waits for its other end, each "
        "occupies a multiprocessor",
    )
    group.add_argument(
        "--pipeline-pair-order",
        choices=PAIR_ORDERS,
        default="megatron",
        help="what follows what in an overlapped pair: megatron: as Megatron's schedule plans run it; report: as "
        "DeepSeek's profile of training shows it",
    )
    group.add_argument(
        "--profile-pipeline",
        type=int,
        metavar="N",
        help="write the measured timeline of step N (not with 1f1b): pictures, and a trace beside a simulated one",
    )
    group.add_argument(
        "--profile-pipeline-dir",
        help="folder for --profile-pipeline (default: --tensorboard-dir, else --save)",
    )


def placement_of(args: Any) -> Placement | None:
    """The V-shaped placement of these arguments, None where stages lie as Megatron places them."""
    traits = TRAITS[args.pipeline_schedule]
    if not traits.folded:
        return None
    chunks = getattr(args, "pipeline_zigzag_chunks", None) if traits.chunks_choice else None
    return Placement(args.pipeline_schedule, args.pipeline_model_parallel_size, chunks or traits.chunks)


def given_options(args: Any) -> dict[str, Any]:
    """Further arguments of `build_schedule` that these arguments give."""
    given = {option: getattr(args, name, None) for name, option in ZIGZAG_OPTIONS.items()}
    return {option: value for option, value in given.items() if value is not None}


def table_options(args: Any) -> dict[str, Any]:
    """Further arguments of `build_schedule`: what is given, and what is nominal without."""
    if not TRAITS[args.pipeline_schedule].chunks_choice:
        return {}
    given = given_options(args)
    return nominal_options(args.pipeline_model_parallel_size, given.get("chunks")) | given


def num_stages(args: Any) -> int:
    """Pipeline stages of the whole model under `--pipeline-schedule`."""
    placement = placement_of(args)
    return args.pipeline_model_parallel_size if placement is None else placement.num_stages


def default_layout(args: Namespace) -> str | None:
    """Megatron's layout notation for a schedule of ours, None where Megatron's own division is meant.

    Stages as even as whole layers allow, the last one counted as if head and each MTP layer weighed 1.5 layers.
    """
    if (
        getattr(args, "pipeline_schedule", "1f1b") == "1f1b"
        or getattr(args, "pipeline_model_parallel_size", 1) < 2
    ):
        return None
    mtp = getattr(args, "mtp_num_layers", None) or 0
    stages = num_stages(args)
    if args.num_layers < stages:
        return None  # refused by the table, which names the option
    return layer_layout(layers_per_stage(args.num_layers, stages, 1 + 2 * mtp), mtp)


def place(args: Any) -> None:
    """After Megatron's validation: fold the layout into a V and use the schedule for this process, if one is named.

    `args.pipeline_model_parallel_size` stays as the user gave it. Under DualPipe every pipeline rank has a replica, so
    Megatron counts twice the data-parallel size, and half the microbatches: those of one direction.
    """
    if getattr(args, "pipeline_schedule", "1f1b") == "1f1b":
        return
    placement = placement_of(args)
    activate(
        args.pipeline_schedule,
        placement,
        args.pipeline_timeout_s,
        args.pipeline_pair_order,
        args.pipeline_max_ctas,
        table_options(args),
    )
    if placement is not None:
        from dsv3_megatron.dualpipe.layout import VLayout

        args.pipeline_model_parallel_layout = VLayout(args.pipeline_model_parallel_layout, placement)
        args.virtual_pipeline_model_parallel_size = placement.chunks
        if placement.mirrored:
            args.data_parallel_size *= 2
        if args.rank == 0:
            print(
                f"> {placement.schedule} on {placement.num_ranks} pipeline ranks, stages: "
                f"{args.pipeline_model_parallel_layout}",
                flush=True,
            )
