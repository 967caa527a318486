"""The refusal table: every unsupported argument or combination, with its message and an example that
triggers it.

It drives the errors (`check`), their tests (each row's example), and the support matrix of docs/support.md.
"""

from argparse import Namespace

from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.refusals import (
    backend,
    checkpoint,
    dispatch,
    ema,
    evaluation,
    files,
    layout,
    length,
    machine,
    model,
    overlap,
    placement,
    posttrain,
    recipe,
    resilience,
    run,
    schedule,
    sft,
)
from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.surroundings import Surroundings, detect

__all__ = ["REFUSALS", "Refusal", "check"]

REFUSALS: tuple[Refusal, ...] = (
    *run.ROWS,
    *files.ROWS,
    *length.ROWS,
    *checkpoint.ROWS,
    *model.ROWS,
    *layout.ROWS,
    *overlap.ROWS,
    *dispatch.ROWS,
    *placement.ROWS,
    *schedule.ROWS,
    *recipe.ROWS,
    *ema.ROWS,
    *evaluation.ROWS,
    *sft.ROWS,
    *posttrain.ROWS,
    *resilience.ROWS,
    *backend.ROWS,
    *machine.ROWS,
)


def check(args: Namespace, around: Surroundings | None = None) -> None:
    """Refuse unsupported combinations.

    Args:
        args: all of Megatron's arguments, parsed and completed, not yet validated by Megatron.
        around: the machine; detected when None.

    Raises:
        RefusedArgument: with the message of every row that applies.
    """
    around = around or detect()
    messages = [row.message(args, around) for row in REFUSALS if row.when(args, around)]
    if messages:
        raise RefusedArgument("\n".join(messages))
