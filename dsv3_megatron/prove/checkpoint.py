"""`dsv3 prove --hf DIR --megatron DIR`: are the two the same model? Every tensor, and what the models compute."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.convert.architecture import Architecture
from dsv3_megatron.convert.dist_checkpoint import DistCheckpoint
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.hf_directory import CONFIG, INDEX, SINGLE, HFDirectory, _json
from dsv3_megatron.convert.progress import Progress
from dsv3_megatron.convert.to_hf import MegatronWeights
from dsv3_megatron.convert.verify import _check_same_model, _difference
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.prove.forward import (
    Forward,
    named,
    of_megatron,
    of_transformers,
    prompt_tokens,
    too_large,
)
from dsv3_megatron.prove.measure import largest
from dsv3_megatron.prove.report import Check, Report

__all__ = ["LOGITS_BOUND", "audit"]

LOGITS_BOUND = 1e-4  # of the largest logit: fp32 on both sides, other orders of summation
NEAR_TIE = 1e-5  # two experts' scores closer than this may be chosen either way


@dataclass
class _Sides:
    hf: HFDirectory
    megatron: MegatronWeights


def audit(
    hf: Path,
    megatron: Path,
    positions: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    logits: bool = True,
    unfinished: Path | None = None,
) -> Report:
    """Compare a Hugging Face directory with a Megatron checkpoint.

    Args:
        positions: places in each prompt whose logits are compared, negative from the end; None for all.
        prompts: texts; None for those of `convert.logits.PROMPTS`.
        logits: compute both models in fp32, where they fit into this machine's free memory.
        unfinished: file for the tensors that are compared already; a later call with the same sides goes on there. To
            be removed when the report is written.
    """
    report = Report(
        "checkpoint",
        "The Hugging Face directory and the Megatron checkpoint are the same model.",
        not_covered=[
            "optimizer state, averages and random states of the Megatron checkpoint",
            "the tokenizer: ids are compared, not the texts they stand for",
            "the arithmetic of a GPU, of FP8 and of other backends: both models are computed in fp32 on the CPU",
            "texts longer than the prompts",
        ],
    )
    sides = _opened(report, hf, megatron)
    if sides is None:
        return report
    report.checks.append(_tensors(sides, report, _Kept(unfinished, sides)))
    if not logits:
        _not_done(report, "left out by --no-logits")
        return report
    if why := too_large(sides.hf):
        _not_done(report, why)
        return report
    tokens = prompt_tokens(sides.hf, prompts)
    for place in positions or ():
        if not any(-ids.numel() <= place < ids.numel() for ids in tokens):
            longest = max(ids.numel() for ids in tokens)
            raise RefusedArgument(f"--positions {place}: the longest prompt has {longest} tokens")
    # The same rounding on both sides: a BF16 checkpoint of an FP8 directory has its products rounded.
    theirs = of_transformers(sides.hf, tokens, sides.megatron.dtype)
    ours = of_megatron(sides.megatron, tokens)
    report.settings |= {
        "positions": list(positions) if positions else "all",
        "tokens": [ids.numel() for ids in tokens],
    }
    report.checks += [
        _logits("logits", theirs, ours, positions, lambda one: one.logits),
        _logits("MTP logits", theirs, ours, positions, lambda one: one.mtp_logits),
        _routers(theirs, ours),
    ]
    depths = sides.hf.architecture.mtp_num_layers
    if depths == 0:
        report.checks = [check for check in report.checks if check.name != "MTP logits"]
        report.not_covered.append("MTP: the model has none")
    elif depths > 1:
        report.not_covered.append(f"logits of MTP depths 2 to {depths}")
    return report


def _opened(report: Report, hf: Path, megatron: Path) -> _Sides | None:
    """Both sides, each complete and without a tensor too many; else the check that failed."""
    name, compared = (
        "inventory",
        "names, shapes and dtypes of each side against the model its configuration describes",
    )
    how = "exactly the model's tensors: none is missing, none is left over; same configuration on both sides"
    # What is no model at all is no side of a comparison; what lacks a tensor, or has one too many, is a wrong one.
    with named("--hf"):
        Architecture.from_hf(_json(hf / CONFIG), mtp_num_layers=0)
        if not any((hf / file).exists() for file in (INDEX, SINGLE)):
            raise ConversionError(f"{hf}: neither {INDEX} nor {SINGLE} is there: it has no weights")
    with named("--megatron"):
        DistCheckpoint(megatron).arguments()
    try:
        sides = _Sides(HFDirectory(hf), MegatronWeights(megatron))
        _check_same_model(sides.megatron, sides.hf)
    except ConversionError as error:
        report.checks.append(Check(name, compared, how, False, detail=str(error)))
        _not_done(report, "the inventory failed")
        return None
    count = len(sides.hf.weights) + len(sides.hf.copies)
    report.checks.append(Check(name, compared, how, True, count))
    return sides


def _not_done(report: Report, why: str) -> None:
    for name in ("logits", "MTP logits", "router decisions"):
        report.checks.append(Check(name, "both models in fp32", "", None, detail=why))


class _Kept:
    """Rows of the table of tensors, appended to a file as they are made; those of an interrupted audit are read."""

    def __init__(self, file: Path | None, sides: _Sides):
        self.rows: dict[str, dict[str, Any]] = {}
        self._handle = None
        if file is None:
            return
        sizes = [
            (path.name, stat.st_size, stat.st_mtime_ns)
            for folder in (sides.hf.folder, sides.megatron.checkpoint.path)
            for path in sorted(folder.iterdir())
            for stat in [path.stat()]
        ]
        head = hashlib.sha256(repr(sizes).encode()).hexdigest()
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError
        ):  # of nothing, or of something else: anew
            whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if whole and json.loads(whole[0]) == head:
                self.rows = {row["name"]: row for row in map(json.loads, whole[1:])}
        try:
            self._handle = open(file, "w")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise RefusedArgument(f"--output: {file}: {error.strerror}") from error
        self._handle.writelines(json.dumps(line) + "\n" for line in (head, *self.rows.values()))

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["name"]] = row
        if self._handle is not None:
            self._handle.write(json.dumps(row) + "\n")
            self._handle.flush()

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()


def _tensors(sides: _Sides, report: Report, kept: _Kept) -> Check:
    """Each tensor, FP8 multiplied out, in the dtype of the Megatron checkpoint: equal bits."""
    names = {name: name for name in sides.hf.weights} | sides.hf.copies
    progress = Progress("prove", sum(sides.hf.entry(name).end - sides.hf.entry(name).start for name in names))
    for name, original in names.items():
        if name not in kept.rows:
            theirs = sides.hf.tensor(name, sides.megatron.dtype(original))
            ours = sides.megatron.tensor(original)
            row: dict[str, Any] = {
                "name": name,
                "megatron": sides.megatron.weights[original].slot.key,
                "shape": list(ours.shape),
                "dtype": str(ours.dtype).removeprefix("torch."),
                "sha256_hf": digest(theirs),
                "sha256_megatron": digest(ours),
            }
            if row["sha256_hf"] != row["sha256_megatron"]:
                row["max_abs_diff"] = _difference(theirs, ours)
            kept.add(row)
            sides.hf.forget(name)
        progress.add(sides.hf.entry(name).end - sides.hf.entry(name).start)
    progress.close()
    kept.close()
    rows = [kept.rows[name] for name in names]
    different = [f"{row['name']} (by {row['max_abs_diff']:.3g})" for row in rows if "max_abs_diff" in row]
    worst = max((row.get("max_abs_diff", 0.0) for row in rows), default=0.0)
    report.tables["tensors"] = rows
    whole = hashlib.sha256("".join(row["sha256_megatron"] for row in rows).encode()).hexdigest()
    report.settings["sha256 of all tensors"] = whole
    more = f" and {len(different) - 5} more" if len(different) > 5 else ""
    return Check(
        "tensors",
        "every tensor, copies in MTP layers included, FP8 multiplied out, in the dtype of the Megatron checkpoint",
        "SHA-256 of the bytes equal; worst: largest difference of two elements",
        not different,
        len(rows),
        worst,
        f"different: {', '.join(different[:5])}{more}" if different else "",
    )


def digest(value: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in order."""
    return hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def _logits(
    name: str,
    theirs: list[Forward],
    ours: list[Forward],
    positions: Sequence[int] | None,
    part: Callable[[Forward], Tensor | None],
) -> Check:
    worst, count, choices, detail = 0.0, 0, 0, ""
    for number, (a, b) in enumerate(zip(map(part, theirs), map(part, ours), strict=True)):
        if a is None or b is None:
            return Check(name, "transformers against the specs' model", "", None, detail="not computed")
        chosen = _places(positions, len(a))
        scale = float(a.abs().max())
        for place in chosen:
            off = largest(a[place], b[place], scale)
            choices += int(a[place].argmax() != b[place].argmax())
            count += 1
            if off > worst:
                worst, detail = off, f"worst in prompt {number}, position {place}"
    return Check(
        name,
        "transformers' model against the specs' model, at the chosen positions of every prompt",
        f"max |a − b| / max |a|, at most {LOGITS_BOUND:g}, fp32, weights rounded to the Megatron checkpoint's dtype",
        worst <= LOGITS_BOUND and count > 0,
        count,
        worst,
        f"{detail}; other first choices: {choices}" if detail else "",
    )


def _places(positions: Sequence[int] | None, length: int) -> list[int]:
    if positions is None:
        return list(range(length))
    return sorted({place % length for place in positions if -length <= place < length})


def _routers(theirs: list[Forward], ours: list[Forward]) -> Check:
    """The sets of experts of every token in every MoE layer; a near-tie of the last place may fall either way."""
    compared, how = "experts of every token in every MoE layer, MTP's included", "the same set"
    tokens = disagree = ties = 0
    where = ""
    for a, b in zip(theirs, ours, strict=True):
        if a.experts.keys() != b.experts.keys():
            odd = sorted(a.experts.keys() ^ b.experts.keys())
            return Check("router decisions", compared, how, False, detail=f"routers on one side only: {odd}")
        for layer, choice in a.experts.items():
            differ = (choice.sort(-1).values != b.experts[layer].sort(-1).values).any(-1)
            tied = differ & (b.margins[layer] < NEAR_TIE)
            tokens += len(choice)
            ties += int(tied.sum())
            disagree += int((differ & ~tied).sum())
            if bool((differ & ~tied).any()) and not where:
                where = f"first: {layer}, token {int((differ & ~tied).nonzero()[0])}"
    if not tokens:
        return Check("router decisions", compared, how, True, detail="no MoE layer")
    detail = f"{ties} near-ties fell differently" if ties else ""
    return Check(
        "router decisions",
        compared,
        f"{how}; where two scores are within {NEAR_TIE:g}, either; worst: tokens that disagree",
        disagree == 0,
        tokens,
        float(disagree),
        where or detail,
    )
