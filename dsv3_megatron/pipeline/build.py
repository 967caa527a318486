"""`build_schedule`: from a schedule's name and sizes to its table, or an error that says what to change."""

from .actions import Action, Schedule
from .dualpipe import dualpipe, dualpipev
from .one_f_one_b import interleaved_overlap, one_f_one_b, zb1p

INTERLEAVED = "interleaved_1f1b_overlap"
SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev", INTERLEAVED)


def build_schedule(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    num_model_chunks: int | None = None,
    microbatch_group_size: int | None = None,
) -> Schedule:
    """Build the table of a pipeline schedule.

    Args:
        name: one of `SCHEDULES`.
        num_ranks: pipeline ranks. They hold one stage each (`1f1b`, `zb1p`), two directions of one stage each
            (`dualpipe`), two stages each (`dualpipev`) or `num_model_chunks` each
            (`interleaved_1f1b_overlap`).
        num_microbatches: per step and data-parallel replica; for `dualpipe` of both directions together.
        num_model_chunks: interleaved only, default 2 (Megatron's virtual pipeline size).
        microbatch_group_size: interleaved only, default `num_ranks` (Megatron's
            `--microbatch-group-size-per-virtual-pipeline-stage`).

    Raises:
        ValueError: naming the argument, its value, and what would be accepted.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name={name!r} is not a pipeline schedule; use one of {', '.join(SCHEDULES)}")
    for option, value in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{option}={value!r}: {name} needs a positive integer")
    if name != INTERLEAVED:
        for option, given in (
            ("num_model_chunks", num_model_chunks),
            ("microbatch_group_size", microbatch_group_size),
        ):
            if given is not None:
                raise ValueError(f"{option}={given}: {name} places its stages itself; leave {option} out")

    down, up = tuple(range(num_ranks)), tuple(reversed(range(num_ranks)))
    placement: tuple[tuple[int, ...], ...] = (down,)
    ranks: tuple[tuple[Action, ...], ...]
    if name == "1f1b":
        ranks = one_f_one_b(num_ranks, num_microbatches)
    elif name == "zb1p":
        ranks = zb1p(num_ranks, num_microbatches)
    elif name == "dualpipe":
        _check_bidirectional(name, num_ranks, num_microbatches)
        placement = (down, up)
        ranks = dualpipe(num_ranks, num_microbatches)
    elif name == "dualpipev":
        _check_enough(name, num_ranks, num_microbatches)
        placement = (down + up,)
        ranks = dualpipev(num_ranks, num_microbatches)
    else:
        num_model_chunks = 2 if num_model_chunks is None else num_model_chunks
        microbatch_group_size = num_ranks if microbatch_group_size is None else microbatch_group_size
        _check_interleaved(num_ranks, num_microbatches, num_model_chunks, microbatch_group_size)
        placement = (down * num_model_chunks,)
        ranks = interleaved_overlap(num_ranks, num_microbatches, num_model_chunks, microbatch_group_size)
    return Schedule(name, num_microbatches, placement, ranks)


def _check_enough(name: str, num_ranks: int, num_microbatches: int) -> None:
    if num_microbatches < 2 * num_ranks:
        raise ValueError(
            f"num_microbatches={num_microbatches} is too few for {name} on num_ranks={num_ranks}; use at "
            f"least {2 * num_ranks} (2·num_ranks): a larger global batch, or fewer pipeline ranks"
        )


def _check_bidirectional(name: str, num_ranks: int, num_microbatches: int) -> None:
    if num_ranks % 2:
        raise ValueError(
            f"num_ranks={num_ranks} is odd; {name} mirrors rank k with rank N−1−k and needs an even number: "
            f"use {max(2, num_ranks - 1)} or {num_ranks + 1}"
        )
    _check_enough(name, num_ranks, num_microbatches)
    if num_microbatches % 2:
        raise ValueError(
            f"num_microbatches={num_microbatches} is odd; {name} gives each direction half of them: use "
            f"{num_microbatches + 1}"
        )


def _check_interleaved(num_ranks: int, num_microbatches: int, num_model_chunks: int, group_size: int) -> None:
    """The conditions of Megatron's interleaved schedule."""
    if num_ranks < 2 or num_model_chunks < 2:
        raise ValueError(
            f"num_ranks={num_ranks}, num_model_chunks={num_model_chunks}: {INTERLEAVED} needs at least 2 of "
            "each; use 1f1b for one chunk per rank"
        )
    if not num_ranks <= group_size <= num_microbatches:
        raise ValueError(
            f"microbatch_group_size={group_size} must lie between num_ranks={num_ranks} and "
            f"num_microbatches={num_microbatches}; use more microbatches or leave microbatch_group_size out"
        )
    if 0 < num_microbatches % group_size < num_ranks:
        raise ValueError(
            f"num_microbatches={num_microbatches} leaves a last group of {num_microbatches % group_size}, "
            f"fewer than num_ranks={num_ranks}; use a multiple of microbatch_group_size={group_size}"
        )
