"""Is this machine ready? Versions, patches with their signature check, GPUs and memory on one screen.

    python -m dsv3_megatron.doctor [--json]

Exit status 1 when something that is needed here is missing, has the wrong version, or does not match.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dsv3_megatron import patching
from dsv3_megatron.arguments import requirements
from dsv3_megatron.arguments.requirements import CUDA, CUDNN, NCCL, TE, TORCH, oldest
from dsv3_megatron.arguments.requirements import version_key as key
from dsv3_megatron.arguments.surroundings import SUPPORTED_MEGATRON

State = Literal["ok", "absent", "missing", "wrong"]
SCREEN = 49  # lines of a report that one looks at without scrolling, the verdict among them

# (distribution, module, lowest version, first unsupported version, what it is for)
NEEDED = (
    (TORCH, "torch", oldest(TORCH), "", ""),
    ("megatron-core", "megatron.core", *SUPPORTED_MEGATRON, ""),
    ("hydra-core", "hydra", "1.3", "", "dsv3_megatron.train_hydra"),
    ("tokenizers", "tokenizers", "0", "", "dsv3_megatron.data"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. `state`: "absent" is fine, "missing" and "wrong" are not."""

    name: str
    state: State
    found: str
    hint: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 0 when everything needed is there, else 1."""
    parser = argparse.ArgumentParser(prog="dsv3_megatron.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    findings = examine()
    healthy = all(finding.state in ("ok", "absent") for finding in findings)
    if options.json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}))
    else:
        print(table(on_one_screen(findings)))
        print("ready" if healthy else "not ready: see the lines marked missing or wrong")
    return 0 if healthy else 1


def examine() -> list[Finding]:
    """All findings, in the order of the report."""
    gpus = gpu_findings()
    has_gpu = gpus[0].state == "ok"
    return [
        python_finding(),
        *(package_finding(*row) for row in NEEDED),
        triton_finding(),
        library_finding(has_gpu),
        transformer_engine_finding(has_gpu),
        *use_findings(),
        apex_finding(),
        wgrad_finding(),
        optional_finding("deep_ep", "DeepEP", "for --moe-token-dispatcher-type flex; from its repository"),
        *gpus,
        memory_finding(),
        *([] if has_gpu else [cpu_runtime_finding()]),
        *patch_findings(),
    ]


def on_one_screen(findings: Sequence[Finding]) -> list[Finding]:
    """The findings with patches that match in one line: all repairs, then feature by feature, those with the most
    first, until the report fits. What does not match keeps its line, and `--json` has a line for each.
    """
    from dsv3_megatron.patching.repairs import REPAIRS

    shown = _folded(findings, "repairs of Megatron", REPAIRS)
    features: dict[str, list[str]] = {}
    for name, module in patching.modules().items():
        if name not in REPAIRS:
            features.setdefault(module.split(".")[1], []).append(name)
    for feature, names in sorted(features.items(), key=lambda item: (-len(item[1]), item[0])):
        if len(shown) < SCREEN:
            break
        shown = _folded(shown, f"patches of {feature}", names)
    return shown


def _folded(findings: Sequence[Finding], title: str, patches: Collection[str]) -> list[Finding]:
    """With those of these patches that match in one line, at the end."""
    matching = [f for f in findings if f.state == "ok" and f.name.removeprefix("patch ") in patches]
    if len(matching) < 2:
        return list(findings)
    listed = ", ".join(finding.name.removeprefix("patch ") for finding in matching)
    together = Finding(title, "ok", f"signatures match: {listed}")
    return [*(finding for finding in findings if finding not in matching), together]


def table(findings: Sequence[Finding]) -> str:
    """The report for people: one line per finding; hints only where not everything is there."""
    rows = [(f.name, f.state, f.found, "" if f.state == "ok" else f.hint) for f in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"{name:{widths[0]}}  {state:{widths[1]}}  {found}{'  - ' + hint if hint else ''}"
        for name, state, found, hint in rows
    )


def python_finding() -> Finding:
    """Python 3.12 or newer."""
    recent = sys.version_info >= (3, 12)
    return Finding(
        "python", "ok" if recent else "wrong", platform.python_version(), "" if recent else "3.12 or newer"
    )


def package_finding(distribution: str, module: str, lowest: str, above: str, purpose: str) -> Finding:
    """A distribution that is needed, in a range of versions."""
    bounds = f">={lowest}" + (f",<{above}" if above else "")
    version = version_of(distribution)
    if version is None:
        return Finding(distribution, "missing", "not installed", f"pip install '{distribution}{bounds}'")
    supported = key(lowest) <= key(version) and (not above or key(version) < key(above))
    if not supported:
        return Finding(distribution, "wrong", version, f"needs {bounds}")
    return Finding(distribution, "ok", version, purpose and f"for {purpose}")


def triton_finding() -> Finding:
    """Megatron imports triton whatever the device."""
    if not installed("triton"):
        return Finding("triton", "missing", "not installed", "Megatron imports it; pip install triton")
    version = version_of("triton") or "unknown version"
    if key(version) < key(oldest("triton")):
        return Finding("triton", "wrong", version, f"needs >={oldest('triton')}")
    return Finding("triton", "ok", version)


def library_finding(has_gpu: bool) -> Finding:
    """CUDA, cuDNN and NCCL, as torch brings them, against what is used of each."""
    versions = {name: requirements.installed_version(name) for name in (CUDA, CUDNN, NCCL)}
    old = [name for name, version in versions.items() if version and key(version) < key(oldest(name))]
    absent = [name for name, version in versions.items() if version is None]
    found = (
        ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        or "none with this torch"
    )
    needed = ", ".join(f"{name} >={oldest(name)}" for name in (*old, *absent))
    state: State = "ok" if not needed else ("wrong" if old else "missing") if has_gpu else "absent"
    return Finding("CUDA libraries", state, found, needed and f"needs {needed}")


def use_findings() -> list[Finding]:
    """What the installed packages lack of what is used of them; nothing where they have it all."""
    found = []
    for package in requirements.packages():
        if requirements.installed_version(package) is None:
            continue
        missing = requirements.lacking(package)
        found += [
            Finding(
                f"{package}: {use.what}",
                "absent",
                "not in this version",
                f"for {use.by or 'every run'}: {use.since}",
            )
            for use in requirements.USES
            if use.key in missing
        ]
    return found


def wgrad_finding() -> Finding:
    """Whose product adds the weight gradients of Megatron's own Linears to fp32 (gradient accumulation fusion)."""
    from dsv3_megatron.backends import wgrad

    named = {"apex": "Apex's fused kernel", "torch": "torch.addmm with fp32 output (no Apex)"}
    return Finding("fp32 weight gradients", "ok", named[wgrad.implementation()])


def optional_finding(module: str, name: str, hint: str) -> Finding:
    """A package that may be absent."""
    if not installed(module):
        return Finding(name, "absent", "not installed", hint)
    return Finding(name, "ok", version_of(module) or "installed")


def transformer_engine_finding(has_gpu: bool) -> Finding:
    """Needed on a GPU (the fast backend); on CPU only its modules could be constructed."""
    name, version = TE, version_of(TE)
    if not installed("transformer_engine") or version is None:
        hint = "pip install 'dsv3_megatron[te]' for --transformer-impl transformer_engine"
        return Finding(name, "missing" if has_gpu else "absent", "not installed", hint)
    if key(version) < key(oldest(TE)):
        return Finding(name, "wrong", version, f"needs >={oldest(TE)}")
    return Finding(name, "ok", version)


def apex_finding(locations: Sequence[str] | None = None) -> Finding:
    """NVIDIA's Apex, told from the unrelated package of that name on PyPI by its folders.

    Args:
        locations: folders of the package `apex`; looked up when None.
    """
    if locations is None:
        spec = importlib.util.find_spec("apex")
        locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations:
        return Finding("apex (NVIDIA)", "absent", "not installed", "optional; NVIDIA's, never from PyPI")
    if any((Path(location) / "optimizers").is_dir() for location in locations):
        return Finding("apex (NVIDIA)", "ok", version_of("apex") or "installed")
    return Finding(
        "apex (NVIDIA)", "wrong", "the unrelated package of that name on PyPI", "pip uninstall apex"
    )


def gpu_findings() -> list[Finding]:
    """One line per GPU with its free memory, or one line saying that there is none."""
    import torch

    from dsv3_megatron import cpu

    if cpu.is_active() or not torch.cuda.is_available():
        return [Finding("GPU", "absent", "none visible", "use --device cpu")]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        compute = f"sm_{properties.major}{properties.minor}"
        text = f"{properties.name}, {compute}, {gib(free)} of {gib(total)} free"
        hint = "" if properties.major >= 9 else "FP8 needs sm_90"
        found.append(Finding(f"GPU {index}", "ok", text, hint))
    return found


def memory_finding() -> Finding:
    """Free host memory, as Linux estimates what a new process can have."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    return Finding(
        "host memory", "ok", f"{gib(values['MemAvailable'])} of {gib(values['MemTotal'])} available"
    )


def cpu_runtime_finding() -> Finding:
    """Whether everything that the CPU runtime replaces exists; activates it in this process."""
    from dsv3_megatron import cpu

    try:
        cpu.activate()
    except (RuntimeError, ImportError, AttributeError) as error:
        return Finding("CPU runtime", "wrong", str(error))
    return Finding("CPU runtime", "ok", "can be activated", "dsv3_megatron.cpu")


def patch_findings() -> list[Finding]:
    """Every patch with the state of its signature check."""
    found = []
    for row in patching.status():
        matches = row.state != "mismatch"
        text = f"signature matches: {row.target}"
        if not matches:
            text = f"{row.target}: expected {row.expected}, found {row.found}"
        why = f"{row.feature}: {row.why}" if row.feature else row.why
        found.append(Finding(f"patch {row.name}", "ok" if matches else "wrong", text, why))
    return found


def installed(module: str) -> bool:
    """Whether a top-level module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def version_of(distribution: str) -> str | None:
    """Version of a distribution, None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def gib(number_of_bytes: int) -> str:
    """Bytes as GiB with one decimal."""
    return f"{number_of_bytes / 2**30:.1f} GiB"


if __name__ == "__main__":
    raise SystemExit(main())
