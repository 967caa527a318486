"""`dsv3 prove fp8`: what a model loses on its way to FP8 and back, per tensor, and what its logits lose."""

import shutil
import sys
import tempfile
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
from dsv3_megatron.fp8.tiles import TILE
from dsv3_megatron.prove.checkpoint import LOGITS_BOUND, _places
from dsv3_megatron.prove.forward import Forward, memory_needed, of_megatron, of_transformers
from dsv3_megatron.prove.report import Check, Report

__all__ = ["prove_fp8"]

RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10  # of an element, of its block's scale: half a step of E4M3
ROUNDING = 1 + 2.0**-20  # the quotient and the product are fp32
DRIFT_BOUND = 0.1  # ‖a − b‖ / ‖b‖ of the logits of all positions


def prove_fp8(
    megatron: Path | None, hf: Path | None, logits: bool = True, spoil: str = "", bound: float = DRIFT_BOUND
) -> Report:
    """Export to FP8 as released, read it back, and import it into Megatron again.

    Args:
        megatron, hf: the model, one of the two; what is not Megatron is converted first.
        spoil: a tensor whose scales are doubled in the FP8 directory: the control.
        bound: of the logits' drift.
    """
    report = Report(
        "fp8",
        "Exported to FP8 (E4M3, 128 × 128 blocks) and read back, the model is the same within FP8's own rounding.",
        not_covered=[
            "activations in FP8: the logits are computed in fp32 from weights that went through FP8",
            "whether the drift matters for a task: evaluate the FP8 directory (dsv3 evaluate) for that",
            "FP8 kernels of a GPU",
            "texts other than the prompts",
        ],
        settings={"bound of the drift": bound},
    )
    beside = (megatron or hf or Path()).resolve().parent
    try:
        folder = Path(tempfile.mkdtemp(prefix="dsv3-prove-", dir=beside))
    except OSError as error:
        raise RefusedArgument(f"{beside}: the copies are made beside the model: {error.strerror}") from error
    try:
        if megatron is None:
            assert hf is not None
            hf_to_megatron(hf, folder / "megatron")
            megatron = folder / "megatron"
        before = MegatronWeights(megatron)
        megatron_to_hf(megatron, folder / "fp8", dtype="fp8")
        if spoil:
            _double_scale(folder / "fp8", spoil)
        exported = HFDirectory(folder / "fp8")
        report.checks += _tensors(before, exported, report)
        needed, free = memory_needed(exported)
        logits_fit = logits and needed <= free
        # In fp32 the import has the products as they are, so that only FP8 shows in the logits.
        hf_to_megatron(folder / "fp8", folder / "back", dtype="fp32" if logits_fit else "keep")
        back = MegatronWeights(folder / "back")
        report.checks.append(_round_trip(exported, back))
        if logits_fit:
            report.checks += _drift(before, back, folder / "fp8", bound, report)
        else:
            short = f"two fp32 models need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            why = short if logits else "left out by --no-logits"
            report.checks.append(Check("logits", "before and after", "", None, detail=why))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


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


def _drift(
    before: MegatronWeights, back: MegatronWeights, fp8: Path, bound: float, report: Report
) -> list[Check]:
    from dsv3_megatron.convert.logits import prompt_tokens

    tokens = prompt_tokens(fp8, before.architecture.vocab_size, None)
    a, b = of_megatron(before, tokens), of_megatron(back, tokens)
    # The FP8 directory itself, read by transformers: a second reader of the same file.
    c = of_transformers(HFDirectory(fp8), tokens)
    return [_logits(a, b, bound, report), _second_reader(b, c)]


def _logits(a: list[Forward], b: list[Forward], bound: float, report: Report) -> Check:
    first = torch.cat([one.logits for one in a])
    second = torch.cat([one.logits for one in b])
    drift = float((first - second).norm() / first.norm())
    same = float((first.argmax(-1) == second.argmax(-1)).float().mean())
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    report.settings |= {"mean KL of the next token, nats": kl, "first choices that stay": same}
    return Check(
        "drift of the logits",
        "the model before and after, at every position of the prompts",
        f"‖a − b‖ / ‖a‖ at most {bound:g}",
        drift <= bound,
        len(first),
        drift,
        f"KL {kl:.2e} nats, first choice kept at {same:.1%} of the positions",
    )


def _second_reader(b: list[Forward], c: list[Forward]) -> Check:
    worst = max(
        _difference(x.logits[_places(None, len(x.logits))], y.logits) / float(x.logits.abs().max())
        for x, y in zip(b, c, strict=True)
    )
    return Check(
        "a second reader",
        "the FP8 directory computed by transformers, against its import into Megatron",
        f"max |a − b| / max |a|, at most {LOGITS_BOUND:g}, fp32",
        worst <= LOGITS_BOUND,
        sum(len(one.logits) for one in b),
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
