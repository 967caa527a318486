"""`gpt_model.process_mtp_loss`: the MTP loss is divided by the main loss's token count.

R§2.2 eq. 24 divides the MTP loss of a sequence by its length T, as the main loss. Megatron divides by the
number of valid *shifted* positions that this rank has in this microbatch. That differs between
context-parallel layouts (the last chunk of a sequence has one fewer), and under per-token loss it weighs
microbatches by their share of shifted positions, so no global reference gives the same gradient. With the
main loss's divisor both losses are one sum over
tokens, scaled once: any split of the batch gives the same gradient.

The value that is logged stays a mean over valid shifted positions: see `mtp_loss_logging`.
"""

import functools
import inspect
from typing import Any

import torch

from dsv3_megatron.patching import Patch


def _install(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def process_mtp_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if given["labels"] is not None:  # without labels (inference, RL) there is no main loss to agree with
            mask = given["loss_mask"]
            mask = torch.ones_like(given["labels"]) if mask is None else mask
            given["compute_language_model_loss"] = _divided_by_main_tokens(given, mask)
        return original(*call.args, **call.kwargs)

    return process_mtp_loss


def _divided_by_main_tokens(given: dict[str, Any], mask: torch.Tensor) -> Any:
    """The loss function [B, S] × [S, B, V] → [B, S] that Megatron calls once per MTP depth, rescaled.

    Megatron will divide by the depth's own positions; multiplying by (own positions / main positions) undoes
    that.
    """
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    compute_loss = given["compute_language_model_loss"]
    main_tokens = mask.sum().clamp(min=1)
    depth = 0

    def scaled_loss(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        nonlocal mask, depth
        mask, own_tokens = roll_tensor(
            mask, shifts=-1, dims=-1, cp_group=given["cp_group"], packed_seq_params=given["packed_seq_params"]
        )
        loss = compute_loss(labels, logits)
        if given["is_training"]:
            _add_to_log((mask * loss).sum(), depth, given["config"].mtp_num_layers)
        depth += 1
        return loss * (own_tokens.to(loss.dtype) / main_tokens)

    return scaled_loss


def _add_to_log(loss_sum: torch.Tensor, depth: int, num_depths: int) -> None:
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    sums = MTPLossLoggingHelper.tracker.setdefault(
        "loss_sums", torch.zeros(num_depths, device=loss_sum.device)
    )
    sums[depth] += loss_sum.detach()


PATCH = Patch(
    name="mtp_loss",
    target="megatron.core.models.gpt.gpt_model:process_mtp_loss",
    signature=(
        "(hidden_states, labels, loss_mask, output_layer, output_weight, runtime_gather_output, is_training, "
        "compute_language_model_loss, config, cp_group=None, tp_group=None, packed_seq_params=None, "
        "scale_logits_fn=None, input_ids=None)"
    ),
    why="the MTP loss is divided by the main loss's tokens (report eq. 24), in every layout",
    install=_install,
)
