"""Forward passes outside training, through the trainer's own schedule."""

from collections.abc import Callable, Iterator
from typing import Any


def run_forward(
    forward_step: Callable,
    model: list[Any],
    batches: Callable[[], Iterator | None],
    num_microbatches: int,
    **more: Any,
) -> list[Any]:
    """Run `num_microbatches` forward only; to be called on every rank.

    Args:
        forward_step: as Megatron's schedules take it.
        model: Megatron's model chunks of this rank.
        batches: gives an iterator over this rank's microbatches, one for each chunk.
        **more: further arguments of the schedule, e.g. `collect_non_loss_data`.

    Returns:
        What the loss function reported for each microbatch; empty where the schedule gives a rank none.
    """
    from megatron.training import get_args, training

    args = get_args()
    iterators = [batches() for _ in model]
    # The name Megatron's own `evaluate` looks up, so that a schedule put in its place serves here too.
    return training.get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=True,
        **more,
    )
