"""The one-directional schedules: 1F1B, ZB1P, and interleaved 1F1B with overlap as Megatron runs it."""

from .actions import Action, Kind


def one_f_one_b(num_ranks: int, num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """1F1B (PipeDream-Flush; Megatron's `forward_backward_pipelining_without_interleaving`)."""
    ranks = []
    for rank in range(num_ranks):
        forward = [Action(Kind.F, rank, 0, m) for m in range(num_microbatches)]
        backward = [Action(Kind.B, rank, 0, m) for m in range(num_microbatches)]
        ranks.append(tuple(_alternate(forward, backward, num_warmup=num_ranks - 1 - rank)))
    return tuple(ranks)


def zb1p(num_ranks: int, num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """ZB1P, the zero-bubble schedule with 1F1B's memory (Qi et al., arXiv 2401.10241, "ZB-H1").

    Rank r runs the weight gradients r microbatches late: the input gradients leave earlier, and the weight
    gradients kept back fill the end of the step.
    """
    ranks = []
    for rank, order in enumerate(one_f_one_b(num_ranks, num_microbatches)):
        actions: list[Action] = []
        next_weight = 0
        for action in order:
            if action.kind is Kind.F:
                actions.append(action)
                continue
            actions.append(action._replace(kind=Kind.B_INPUT))
            if action.microbatch >= rank:
                actions.append(Action(Kind.W, rank, 0, next_weight))
                next_weight += 1
        actions.extend(Action(Kind.W, rank, 0, m) for m in range(next_weight, num_microbatches))
        ranks.append(tuple(actions))
    return tuple(ranks)


def interleaved_overlap(
    num_ranks: int, num_microbatches: int, num_model_chunks: int, microbatch_group_size: int
) -> tuple[tuple[Action, ...], ...]:
    """Interleaved 1F1B whose steady state runs overlapped pairs (Megatron's
    `--overlap-moe-expert-parallel-comm`).

    Chunk c of rank r is stage c·num_ranks + r. Forwards go through groups of `microbatch_group_size`
    microbatches, chunk by chunk, backwards likewise from the last chunk. One forward more than in plain
    interleaved 1F1B runs in the warm-up, so that the two halves of a pair are independent. One rank with one
    chunk is Megatron's schedule without a pipeline (`combined_1f1b_schedule_for_no_pipelining`).
    """
    order = [
        (microbatch, chunk)
        for start in range(0, num_microbatches, microbatch_group_size)
        for chunk in range(num_model_chunks)
        for microbatch in range(start, min(start + microbatch_group_size, num_microbatches))
    ]
    ranks = []
    for rank in range(num_ranks):
        forward = [Action(Kind.F, chunk * num_ranks + rank, 0, m) for m, chunk in order]
        backward = [
            Action(Kind.B, (num_model_chunks - 1 - chunk) * num_ranks + rank, 0, m) for m, chunk in order
        ]
        num_warmup = 2 * (num_ranks - rank - 1) + (num_model_chunks - 1) * microbatch_group_size + 1
        ranks.append(tuple(_alternate(forward, backward, num_warmup, paired=True)))
    return tuple(ranks)


def _alternate(
    forward: list[Action], backward: list[Action], num_warmup: int, paired: bool = False
) -> list[Action]:
    """Warm-up forwards, then one forward and one backward in turn (or paired), then the remaining
    backwards."""
    num_warmup = min(num_warmup, len(forward))
    actions = forward[:num_warmup]
    for f, b in zip(forward[num_warmup:], backward, strict=False):
        actions.extend([Action.pair(f, b)] if paired else [f, b])
    actions.extend(backward[len(forward) - num_warmup :])
    return actions
