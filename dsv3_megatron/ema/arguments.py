"""The options of the average of the weights."""

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Add `--ema-decay`, `--ema-threads` and `--eval-ema` to Megatron's parser."""
    group = parser.add_argument_group("dsv3 average of the weights")
    group.add_argument(
        "--ema-decay",
        type=float,
        metavar="D",
        help="keep an exponential moving average of the weights in CPU memory: D of the past and 1 - D of the weights "
        "after each step (DeepSeek-V3's D is unpublished)",
    )
    group.add_argument(
        "--ema-threads",
        type=int,
        metavar="N",
        help="CPU threads with which a rank updates its average (default: the machine's cores shared among its ranks, "
        "at most 16; OMP_NUM_THREADS is the training thread's)",
    )
    group.add_argument(
        "--eval-ema",
        action="store_true",
        help="evaluate the average in place of the weights; with --skip-train it is what is loaded, evaluated and "
        "exported (--ckpt-convert-format)",
    )


def threads_of(args: Namespace, cores: int, ranks_per_node: int) -> int:
    """CPU threads of one rank's average: as asked, else a fair share of the cores, one left for the training thread."""
    if args.ema_threads is not None:
        return args.ema_threads
    return max(1, min(16, cores // ranks_per_node - 1))
