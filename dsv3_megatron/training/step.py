"""The forward step that `megatron.training.pretrain` calls, and its loss."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens

from dsv3_megatron.training import hooks
from dsv3_megatron.training.batch import get_batch, packed_seq_params

# A loss this many times the largest one seen is reported by --check-for-spiky-loss.
SPIKY_LOSS_FACTOR = 10

_straggler_timer = StragglerDetector()

# Losses of features, see `add_loss`.
_losses: list[tuple[Callable[[Any], bool], Callable[..., Any]]] = []


def add_loss(wanted: Callable[[Any], bool], loss: Callable[..., Any]) -> None:
    """Register a loss that takes the place of the mean cross entropy.

    Args:
        wanted: args -> whether this run has it; the first that is wanted counts.
        loss: (batch, losses) -> what `loss_func` returns; `losses` is the last stage's cross entropy per token, fp32
            [b, s], which is −log π of the labels. The batch's `loss_mask` is then the MTP layer's alone.
    """
    if (wanted, loss) not in _losses:
        _losses.append((wanted, loss))


def forward_step(
    data_iterator: Iterator[dict[str, Any]] | None, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., Any]]:
    """Run one microbatch through a model chunk.

    Args:
        data_iterator: yields sample dicts on the ranks that read them, else None.
        model: a (wrapped) model chunk.
        return_schedule_plan: return the chunk's schedule plan, not yet run, for overlapped schedules.

    Returns:
        The chunk's output (loss per token, fp32 [b, s], on the last stage) or its plan, and the loss
        function.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler_timer(bdata=True):
        batch = get_batch(data_iterator, model)
        packing = packed_seq_params(batch)
        if packing is not None:
            update_seqlen_stats_from_cu_seqlens(batch["cu_seqlens"].squeeze(0))
    timers("batch-generator").stop()

    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    # A plan takes packed sequences too (Megatron's own entry point drops them there).
    kwargs = {
        "labels": batch["labels"],
        "loss_mask": batch["loss_mask"],
        "packed_seq_params": packing,
        "padding_mask": batch["padding_mask"],
    }
    with _straggler_timer:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **kwargs)
        else:
            with hooks.forward(model, batch):
                output = model(*inputs, **kwargs)
    if not return_schedule_plan:
        hooks.saw_output(model, output)
    return output, _loss_of(batch)


def _loss_of(batch: dict[str, Any]) -> Callable[..., Any]:
    for wanted, loss in _losses:
        if wanted(get_args()):
            return partial(loss, batch)
    return partial(loss_func, batch["loss_mask"])


def loss_func(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the unmasked losses of a microbatch.

    Args:
        loss_mask: fp32 [b, s], 1 where a token counts.
        losses: fp32 [b, s], cross entropy per token.

    Returns:
        The sum, the number of unmasked tokens (int32; Megatron divides by it), and `{"lm loss": [sum,
        tokens]}` to be reduced and logged.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    hooks.saw_loss(loss, num_tokens)
    _validate(loss)
    report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}
    return loss, num_tokens, report


def _validate(loss: torch.Tensor) -> None:
    """Let Megatron's rerun state machine repeat a step with a spike, to tell a faulty device from a bad batch.

    NaN and Inf are the guard's (`dsv3_megatron.resilience.guard`).
    """
    if get_args().check_for_spiky_loss:
        machine = get_rerun_state_machine()
        unexpected = partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        # Forward passes are deterministic, hence tolerance 0.
        machine.validate_result(loss, unexpected, "spiky loss", tolerance=0.0, fatal=False)
