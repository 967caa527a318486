"""`dsv3 prove fp8`: what a model loses on its way to FP8 and back, per tensor, and what its logits lose."""

import math
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.convert.hf_directory import SCALE, HFDirectory
from dsv3_megatron.convert.inventory import is_quantized
from dsv3_megatron.convert.progress import Progress
from dsv3_megatron.convert.to_hf import MegatronWeights, megatron_to_hf
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.convert.verify import _difference
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.fp8.precision import recipe_of
from dsv3_megatron.fp8.tiles import TILE
from dsv3_megatron.prove.checkpoint import LOGITS_BOUND
from dsv3_megatron.prove.forward import (
    Forward,
    named,
    of_megatron,
    of_transformers,
    prompt_tokens,
    too_large,
)
from dsv3_megatron.prove.measure import largest, norm
from dsv3_megatron.prove.report import Check, Report

__all__ = ["prove_fp8"]

RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10  # of an element, of its block's scale: half a step of E4M3
ROUNDING = 1 + 2.0**-20  # the quotient and the product are fp32
DRIFT_BOUND = 0.1  # ‖a − b‖ / ‖a‖ of the logits of all positions; where it comes from: docs/prove.md


def prove_fp8(
    megatron: Path | None,
    hf: Path | None,
    logits: bool = True,
    spoil: str = "",
    bound: float = DRIFT_BOUND,
    beside: Path | None = None,
    prompts: Sequence[str] | None = None,
) -> Report:
    """Export to FP8 as released, read it back, and import it into Megatron again.

    Args:
        megatron, hf: the model, one of the two; what is not Megatron is converted first.
        spoil: a tensor whose scales are doubled in the FP8 directory: the control.
        bound: of the logits' drift.
        beside: a Megatron checkpoint that goes the same way, for its drift alone.
        prompts: texts; None for those of `convert.logits.PROMPTS`.
    """
    report = Report(
        "fp8",
        "Exported to FP8 (E4M3, 128 × 128 blocks) and read back, the model is the same within FP8's own rounding.",
        not_covered=[
            "whether the drift matters for a task: evaluate the FP8 directory (dsv3 evaluate) for that",
            "what training in FP8 did to the model before: its weights are what they are",
            "FP8 kernels of a GPU",
            "texts other than the prompts",
        ],
        settings={"bound of the drift": bound},
    )
    for option, folder in (("--megatron", megatron), ("--beside", beside)):
        if folder is not None:
            with named(option):
                MegatronWeights(folder)
    if hf is not None:
        with named("--hf"):
            HFDirectory(hf)
    around = (megatron or hf or Path()).resolve().parent
    try:
        folder = Path(tempfile.mkdtemp(prefix="dsv3-prove-", dir=around))
    except OSError as error:
        raise RefusedArgument(f"{around}: the copies are made beside the model: {error.strerror}") from error
    try:
        if megatron is None:
            assert hf is not None
            hf_to_megatron(hf, folder / "megatron")
            megatron = folder / "megatron"
        way = _Way(folder / "this", megatron, spoil, logits)
        report.checks += _tensors(way.before, way.exported, report)
        report.checks.append(_round_trip(way.exported, way.back))
        if way.computed:
            report.checks += _drift(way, bound, prompts, report)
        else:
            why = way.too_large if logits else "left out by --no-logits"
            report.checks.append(Check("logits", "before and after", "", None, detail=why))
        if beside is not None and way.computed:
            report.checks.append(_beside(_Way(folder / "beside", beside, "", logits), prompts, report))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


class _Way:
    """A model's way to FP8 and back.

    Attributes:
        before, exported, back: the checkpoint, the FP8 directory made of it, the checkpoint made of that.
        too_large: why logits cannot be computed here, "" where they can.
        computed: whether logits are wanted and fit.
    """

    def __init__(self, folder: Path, megatron: Path, spoil: str, logits: bool):
        self.before = MegatronWeights(megatron)
        megatron_to_hf(megatron, folder / "fp8", dtype="fp8")
        if spoil:
            _double_scale(folder / "fp8", spoil)
        self.exported = HFDirectory(folder / "fp8")
        self.too_large = too_large(self.exported)
        self.computed = logits and not self.too_large
        # In fp32 the import has the products as they are, so that only FP8 shows in the logits.
        hf_to_megatron(folder / "fp8", folder / "back", dtype="fp32" if self.computed else "keep")
        self.back = MegatronWeights(folder / "back")

    def tokens(self, prompts: Sequence[str] | None) -> list[Tensor]:
        """Ids of the prompts, int64 [1, s] each, by the model's own tokenizer."""
        return prompt_tokens(self.exported, prompts)

    @property
    def recipe(self) -> str:
        """The FP8 recipe of ours that the model was trained with; "" for another, or none."""
        found = recipe_of(self._arguments)
        return found.name if found else ""

    @property
    def trained_in(self) -> str:
        """Precision of the training, as the checkpoint's arguments say it."""
        arguments = self._arguments
        if not getattr(arguments, "consumed_train_samples", 0):
            return "a precision that its files do not name (it is a conversion)"
        if self.recipe:
            return f"FP8 ({self.recipe})"
        if arguments.fp8:
            return f"FP8 ({arguments.fp8}, {arguments.fp8_recipe})"
        return (
            "BF16"
            if getattr(arguments, "bf16", False)
            else "FP16"
            if getattr(arguments, "fp16", False)
            else "FP32"
        )

    @property
    def _arguments(self) -> Namespace:
        return Namespace(**({"fp8": None, "fp8_recipe": None} | vars(self.before.arguments)))


def _tensors(before: MegatronWeights, exported: HFDirectory, report: Report) -> list[Check]:
    progress = Progress("prove", sum(weight_bytes(exported, name) for name in exported.weights))
    rows: list[dict[str, Any]] = []
    broken, untouched_broken = [], []
    worst, quantized, kept = 0.0, 0, 0
    for name in exported.weights:
        original = before.tensor(name).float()
        if exported.is_fp8(name):
            quantized += 1
            row = _errors(name, original, exported)
            rows.append(row)
            worst = max(worst, row["of_bound"])
            if row["of_bound"] > 1:
                broken.append(name)
        else:
            kept += 1
            # What is not quantised is bf16 in such a directory (fp32 stays for the routers' bias).
            wanted = original.to(exported.entry(name).dtype).float()
            if _difference(wanted, exported.tensor(name, torch.float32)) > 0 or is_quantized(name):
                untouched_broken.append(name)
        progress.add(weight_bytes(exported, name))
        exported.forget(name)
    progress.close()
    rows.sort(key=lambda row: -row["of_bound"])
    report.tables["tensors"] = rows
    return [
        Check(
            "error of each element",
            "every FP8 tensor, multiplied out, against the original",
            "|a − b| ≤ max(2⁻⁴ |b|, 2⁻¹⁰ scale of its block), half a step of E4M3; worst: part of this bound",
            not broken and quantized > 0,
            quantized,
            worst,
            f"beyond it: {', '.join(broken[:5])}" if broken else "",
        ),
        Check(
            "tensors that stay",
            "embedding, head, norms, routers, MTP's projection",
            "equal to the original, rounded to bf16 where it was fp32",
            not untouched_broken,
            kept,
            None,
            f"different: {', '.join(untouched_broken[:5])}" if untouched_broken else "",
        ),
    ]


def weight_bytes(exported: HFDirectory, name: str) -> int:
    entry = exported.entry(name)
    return entry.end - entry.start


def _errors(name: str, original: Tensor, exported: HFDirectory) -> dict[str, Any]:
    """Error of a tensor in parts of its elements' bounds, as root of mean squares, and at most."""
    scale = exported.stored(name + SCALE)
    rows, columns = original.shape
    spread = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    error = (exported.tensor(name, torch.float32) - original).abs()
    bound = ROUNDING * torch.maximum(RELATIVE * original.abs(), ABSOLUTE * spread)
    ratio = torch.where(error == 0, 0.0, error / bound)
    norm = float(original.norm())
    return {
        "name": name,
        "of_bound": float(ratio.nan_to_num(nan=torch.inf).max()),
        "relative_rms": float(error.norm()) / norm if norm else 0.0,
        "max_abs_error": float(error.max()),
    }


def _round_trip(exported: HFDirectory, back: MegatronWeights) -> Check:
    """The directory, imported again, is the directory."""
    worst, differ = 0.0, []
    for name in exported.weights:
        off = _difference(exported.tensor(name, back.dtype(name)), back.tensor(name))
        worst = max(worst, off)
        if off:
            differ.append(name)
    return Check(
        "import of the FP8 directory",
        "every tensor of the Megatron checkpoint made of it, against the directory multiplied out",
        "equal",
        not differ,
        len(exported.weights),
        worst,
        f"different: {', '.join(differ[:5])}" if differ else "",
    )


def _drift(way: _Way, bound: float, prompts: Sequence[str] | None, report: Report) -> list[Check]:
    tokens = way.tokens(prompts)
    report.settings |= {"tokens": [ids.numel() for ids in tokens], "trained in": way.trained_in}
    before, after = of_megatron(way.before, tokens), of_megatron(way.back, tokens)
    checks = [_compared("drift of the logits", "the model before and after", before, after, bound, report)]
    if way.recipe:
        # What FP8 training computed with: the same blocks of the same weights, and activations in FP8 too.
        as_trained = of_megatron(way.before, tokens, way.recipe), of_megatron(way.back, tokens, way.recipe)
        what = f"the model before and after, both computed with the FP8 products of --fp8-recipe {way.recipe}"
        checks.append(_compared("drift in FP8 arithmetic", what, *as_trained, bound, report))
        _figures("FP8 products against fp32, before the export", before, as_trained[0], report)
    else:
        report.not_covered.append(
            "activations in FP8: it was not trained with them, and logits are computed in fp32"
        )
    # The FP8 directory itself, read by transformers: a second reader of the same file.
    return [*checks, _second_reader(after, of_transformers(way.exported, tokens))]


def _beside(way: _Way, prompts: Sequence[str] | None, report: Report) -> Check:
    """Its figures stand in the table; it holds where there are figures."""
    if not way.computed:
        return Check("drift of the logits, beside", "another checkpoint", "", None, detail=way.too_large)
    tokens = way.tokens(prompts)
    report.settings["beside it, trained in"] = way.trained_in
    found = _figures(
        "drift of the logits, beside", of_megatron(way.before, tokens), of_megatron(way.back, tokens), report
    )
    return Check(
        "drift of the logits, beside",
        f"the other checkpoint, trained in {way.trained_in}, before and after",
        "‖a − b‖ / ‖a‖, finite; no bound: it stands beside the first",
        math.isfinite(found["drift"]),
        found["positions"],
        found["drift"],
        _told(found),
    )


def _compared(
    name: str, what: str, before: list[Forward], after: list[Forward], bound: float, report: Report
) -> Check:
    found = _figures(name, before, after, report)
    return Check(
        name,
        f"{what}, at every position of the prompts",
        f"‖a − b‖ / ‖a‖ at most {bound:g}",
        found["drift"] <= bound,
        found["positions"],
        found["drift"],
        _told(found),
    )


def _figures(name: str, before: list[Forward], after: list[Forward], report: Report) -> dict[str, Any]:
    """A row of the table `drift`."""
    a, b = (torch.cat([one.logits for one in side]) for side in (before, after))
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    row = {
        "name": name,
        "positions": len(a),
        "drift": norm(b, a),
        "kl_nats": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "first_choices_kept": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
    }
    report.tables.setdefault("drift", []).append(row)
    return row


def _told(row: dict[str, Any]) -> str:
    return (
        f"KL {row['kl_nats']:.2e} nats, first choice kept at {row['first_choices_kept']:.1%} of the positions"
    )


def _second_reader(ours: list[Forward], theirs: list[Forward]) -> Check:
    worst = max(largest(a.logits, b.logits) for a, b in zip(ours, theirs, strict=True))
    return Check(
        "a second reader",
        "the FP8 directory computed by transformers, against its import into Megatron",
        f"max |a − b| / max |a|, at most {LOGITS_BOUND:g}, fp32",
        worst <= LOGITS_BOUND,
        sum(len(one.logits) for one in ours),
        worst,
    )


def _double_scale(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name + SCALE in tensors:
            tensors[name + SCALE] = tensors[name + SCALE] * 2
            save_file(tensors, file, metadata={"format": "pt"})
            return
    print(f"prove: no {name}{SCALE} to spoil", file=sys.stderr)
