"""Compare a Hugging Face directory with a Megatron checkpoint: every tensor, and the logits where the model fits."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_directory import HFDirectory
from dsv3_megatron.convert.progress import Progress
from dsv3_megatron.convert.to_hf import MegatronWeights

__all__ = ["verify"]

_ROWS = 1 << 22  # elements compared at a time


def verify(
    hf: Path, megatron: Path, prompts: Sequence[str] | None = None, logits: bool = True
) -> dict[str, Any]:
    """Compare the two, with a line of progress on stderr.

    Args:
        prompts: texts whose logits are compared; None for those of `logits.PROMPTS`.
        logits: compute logits too, where both models fit in fp32 into this machine's free memory.

    Returns:
        `tensors`: number of tensors compared, copies in MTP layers included; `max_abs_diff`: the largest difference of
        two elements, of values in the dtype of the Megatron checkpoint (FP8 multiplied out); `logits_max_abs_diff`:
        the same of the logits in fp32, None where they were not computed.

    Raises:
        ConversionError: either side is incomplete, or they are different models.
    """
    ours, theirs = MegatronWeights(megatron), HFDirectory(hf)
    _check_same_model(ours, theirs)
    names = {name: name for name in theirs.weights} | theirs.copies
    total = sum(theirs.entry(name).end - theirs.entry(name).start for name in names)
    progress = Progress("verify", total)
    largest = 0.0
    for name, original in names.items():
        largest = max(largest, _difference(theirs.tensor(name, ours.dtype(original)), ours.tensor(original)))
        progress.add(theirs.entry(name).end - theirs.entry(name).start)
        theirs.forget(name)
    progress.close()
    return {
        "tensors": len(names),
        "max_abs_diff": largest,
        "logits_max_abs_diff": _logits(ours, theirs, prompts) if logits else None,
    }


def _check_same_model(ours: MegatronWeights, theirs: HFDirectory) -> None:
    a, b = vars(ours.architecture), vars(theirs.architecture)
    differ = [f"{name}: {a[name]} in Megatron, {b[name]} in config.json" for name in a if a[name] != b[name]]
    if differ:
        raise ConversionError(
            f"{theirs.folder} and {ours.checkpoint.path} are different models: {'; '.join(differ)}"
        )


def _difference(a: Tensor, b: Tensor) -> float:
    """max |a − b|; infinite where exactly one of the two is not a number."""
    largest = 0.0
    a, b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.numel(), _ROWS):
        x, y = a[start : start + _ROWS].float(), b[start : start + _ROWS].float()
        difference = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs())
        largest = max(largest, float(difference.nan_to_num(nan=torch.inf).max()))
    return largest


def _logits(ours: MegatronWeights, theirs: HFDirectory, prompts: Sequence[str] | None) -> float | None:
    from dsv3_megatron.convert import logits

    needed = 2 * 4 * sum(theirs.entry(name).numel for name in theirs.weights)
    free = logits.free_memory()
    if needed > free:
        print(
            f"verify: no logits: two fp32 models of {needed / 2e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            file=sys.stderr,
        )
        return None
    tokens = logits.prompt_tokens(theirs.folder, theirs.architecture.vocab_size, prompts)
    expected = logits.of_transformers(theirs, tokens)
    got = logits.of_megatron(theirs.architecture, ours.checkpoint.path, tokens)
    return max(_difference(a, b) for a, b in zip(expected, got, strict=True))
