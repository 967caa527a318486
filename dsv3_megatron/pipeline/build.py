"""`build_schedule`: from a schedule's name and sizes to its table, or an error that says what to change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .actions import Action, Schedule
from .bound import lower_bound
from .dealing import Budget
from .dualpipe import dualpipe, dualpipev
from .fit import read_costs
from .one_f_one_b import interleaved_overlap, one_f_one_b, zb1p
from .simulate import Costs
from .zigzag import ALPHAS, default_cap, zigzag, zigzag_placement

INTERLEAVED = "interleaved_1f1b_overlap"
ZIGZAG = "zigzag"
SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev", INTERLEAVED, ZIGZAG)


def build_schedule(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    num_model_chunks: int | None = None,
    microbatch_group_size: int | None = None,
    chunks: int | None = None,
    costs: Costs | Path | str | None = None,
    memory_cap: float | None = None,
    deferred: float | Sequence[float] | None = None,
    kept: float | Sequence[float] | None = None,
    alpha: float | None = None,
) -> Schedule:
    """Build the table of a pipeline schedule.

    Args:
        name: one of `SCHEDULES`.
        num_ranks: pipeline ranks. They hold one stage each (`1f1b`, `zb1p`), two directions of one stage each
            (`dualpipe`), two stages each (`dualpipev`), `num_model_chunks` each
            (`interleaved_1f1b_overlap`) or `chunks` each (`zigzag`).
        num_microbatches: per step and data-parallel replica; for `dualpipe` of both directions together.
        num_model_chunks: interleaved only, default 2 (Megatron's virtual pipeline size).
        microbatch_group_size: interleaved only, default `num_ranks` (Megatron's
            `--microbatch-group-size-per-virtual-pipeline-stage`).
        chunks: zigzag only, stages of a rank: 2 (default), 4, …: once down the ranks and back for each two.
        costs: zigzag only: what its weight gradients are dealt by, default `Costs()`; or a file that
            `--profile-pipeline` wrote. Per stage, sequences have one number for each of the stages.
        memory_cap: zigzag only: the most that a rank holds, in activations of a microbatch in one chunk, waiting
            weight gradients counted; default chunks·num_ranks + 2.
        deferred: zigzag only: what waiting weight gradients hold, in the same unit (default 1.0; 1.8 in DeepSeek-V3),
            one number or one for each stage.
        kept: zigzag only: what a forward keeps, likewise (default 1.0).
        alpha: zigzag only: how many pairs are split at the end of a step, default the best of `zigzag.ALPHAS`.

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
    dealing = {
        "chunks": chunks,
        "costs": costs,
        "memory_cap": memory_cap,
        "deferred": deferred,
        "kept": kept,
        "alpha": alpha,
    }
    if name == ZIGZAG:
        return _zigzag(num_ranks, num_microbatches, **dealing)  # type: ignore[arg-type]
    for option, chosen in dealing.items():
        if chosen is not None:
            raise ValueError(
                f"{option}={chosen}: only {ZIGZAG} deals its weight gradients; leave {option} out"
            )

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


def _zigzag(
    num_ranks: int,
    num_microbatches: int,
    chunks: int | None,
    costs: Costs | Path | str | None,
    memory_cap: float | None,
    deferred: float | Sequence[float] | None,
    kept: float | Sequence[float] | None,
    alpha: float | None,
) -> Schedule:
    chunks = _check_zigzag(num_ranks, chunks, alpha)
    if costs is None or isinstance(costs, str | Path):
        costs = Costs() if costs is None else read_costs(Path(costs), num_ranks * chunks)
    budget = zigzag_budget(num_ranks, chunks, memory_cap, deferred, kept)
    alphas = ALPHAS if alpha is None else (float(alpha),)
    dealt = zigzag(num_ranks, num_microbatches, chunks, _hashable(costs), budget, alphas)
    return Schedule(ZIGZAG, num_microbatches, (zigzag_placement(num_ranks, chunks),), dealt.ranks)


def zigzag_budget(
    num_ranks: int,
    chunks: int,
    memory_cap: float | None = None,
    deferred: float | Sequence[float] | None = None,
    kept: float | Sequence[float] | None = None,
) -> Budget:
    """The memory that `build_schedule` deals under, given its arguments."""

    def amount(value: float | Sequence[float] | None) -> Any:
        return 1.0 if value is None else tuple(value) if isinstance(value, Sequence) else value

    cap = default_cap(num_ranks, chunks) if memory_cap is None else memory_cap
    return Budget(cap, amount(deferred), amount(kept))


def zigzag_lower_bound(
    num_ranks: int,
    num_microbatches: int,
    chunks: int = 2,
    costs: Costs | None = None,
    memory_cap: float | None = None,
    deferred: float | Sequence[float] | None = None,
    kept: float | Sequence[float] | None = None,
) -> float:
    """No table on zigzag's placement is shorter (`bound.lower_bound`); arguments as those of `build_schedule`."""
    _check_zigzag(num_ranks, chunks, None)
    budget = zigzag_budget(num_ranks, chunks, memory_cap, deferred, kept)
    return lower_bound(num_ranks, num_microbatches, chunks, costs or Costs(), budget)


def _hashable(costs: Costs) -> Costs:
    values = {name: getattr(costs, name) for name in ("f", "b", "w", "fb", "p2p")}
    return Costs(
        **{name: tuple(value) if isinstance(value, Sequence) else value for name, value in values.items()}
    )


def _check_zigzag(num_ranks: int, chunks: int | None, alpha: float | None) -> int:
    """The number of chunks."""
    chunks = 2 if chunks is None else chunks
    if not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 2 or chunks % 2:
        raise ValueError(
            f"chunks={chunks}: the stages of {ZIGZAG} run down the ranks and back up; use an even number, 2 or 4"
        )
    if num_ranks < 2:
        raise ValueError(f"num_ranks={num_ranks}: {ZIGZAG} needs at least 2 ranks; use 1f1b on one")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: a share of the ranks behind a rank; use a number from 0 to 1")
    return chunks


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
    """The conditions of Megatron's interleaved schedule, and of its schedule for one stage."""
    if (num_ranks < 2 or num_model_chunks < 2) and num_ranks * num_model_chunks > 1:
        raise ValueError(
            f"num_ranks={num_ranks}, num_model_chunks={num_model_chunks}: {INTERLEAVED} needs at least 2 of "
            "each, or one stage in all; use 1f1b for one chunk per rank"
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
