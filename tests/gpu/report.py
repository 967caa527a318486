"""The report of the GPU tests: `Report` gathers the steps' rows (`rows.py`) into one JSON and Markdown."""

import importlib.metadata
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from dsv3_megatron.arguments.card import FORMAT, source
from tests.gpu.rows import write
from tests.gpu.stages import STAGES, Step

PACKAGES = ("dsv3_megatron", "megatron-core", "torch", "transformer-engine", "triton", "nvidia-nccl-cu13")


class Report:
    """The report of one version of the sources on one device; another's is put aside under its own name.

    Args:
        folder: for report.json, report.md and the steps' logs and rows.
        device: the GPU's name, "CPU" in a rehearsal.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "version": _version("dsv3_megatron"),
            "source": source(),
            "device": device,
            "machine": machine(),
            "stages": {
                name: {"title": stage.title, "steps": [step.name for step in stage.steps]}
                for name, stage in STAGES.items()
            },
            "steps": {},
        }
        file = folder / "report.json"
        if file.exists():
            old = json.loads(file.read_text())
            if all(old.get(key) == self.record[key] for key in ("format", "version", "source", "device")):
                self.record["steps"] = old["steps"]
            else:
                for path in [file, *folder.glob("*.rows.json"), *folder.glob("*.log")]:
                    path.rename(folder / f"old-{old.get('source', 'unknown')}-{path.name}")

    def passed(self, step: str) -> bool:
        return self.record["steps"].get(step, {}).get("result") == "passed"

    def rows_file(self, step: str) -> Path:
        """Where the pytest process of a step writes its rows; those of earlier runs are there."""
        file = self.folder / f"{step}.rows.json"
        if not file.exists() and step in self.record["steps"]:
            write(file, json.dumps(self.record["steps"][step]["tests"]))
        return file

    def add(self, stage: str, step: Step, status: int | None, seconds: float, command: str) -> dict[str, Any]:
        """Enter a step that has ended (status None: killed at its limit); returns its entry."""
        file = self.rows_file(step.name)
        tests = json.loads(file.read_text()) if file.exists() else []
        results = [test["result"] for test in tests]
        result = "passed"
        if status is None:
            result = "killed at its limit"
        elif status not in (0, 5) or "failed" in results or "not finished" in results:  # 5: no test was left
            result = "failed"
        elif not tests:
            result = "failed"  # nothing ran: nothing is known
        elif set(results) == {"skipped"}:
            result = "skipped"
        self.record["steps"][step.name] = {
            "stage": stage,
            "result": result,
            "counts": {name: results.count(name) for name in sorted(set(results))},
            "figures": {name: said for name in step.figures if (said := _recorded(tests, name))},
            "seconds": round(seconds, 1),
            "date": time.strftime("%Y-%m-%d"),
            "command": command,
            "tests": tests,
        }
        self.write()
        return self.record["steps"][step.name]

    def write(self) -> None:
        write(self.folder / "report.json", json.dumps(self.record, indent=1) + "\n")
        write(self.folder / "report.md", markdown(self.record))


def _recorded(tests: list[dict[str, Any]], name: str) -> str:
    """What the tests of a step recorded under a name, each value once, on one line."""
    values = [
        " ".join(str(test["figures"][name]).split()) for test in tests if name in test.get("figures", {})
    ]
    return " / ".join(dict.fromkeys(values))


def machine() -> dict[str, Any]:
    """GPUs as the driver names them, package versions."""
    return {
        "gpus": _output(
            "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
        ),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def markdown(record: dict[str, Any]) -> str:
    """The report for people: machine, a row per step, a row per test."""
    lines = ["# GPU tests", "", f"- device: {record['device']}"]
    lines += [f"- GPU: {gpu}" for gpu in (record["machine"]["gpus"] or "none").splitlines()]
    lines += [f"- {name}: {value}" for name, value in record["machine"]["versions"].items()]
    lines += [
        f"- sources: {record['source']}",
        "",
        "| stage | step | result | tests | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, step in record["steps"].items():
        counts = ", ".join(f"{count} {result}" for result, count in step["counts"].items())
        lines.append(f"| {step['stage']} | {name} | {step['result']} | {counts} | {step['seconds']} |")
    lines += ["", "| test | result | seconds | figures |", "|---|---|---|---|"]
    for step in record["steps"].values():
        for row in step["tests"]:
            said = [f"{name} = {value}" for name, value in row["figures"].items()]
            if row["result"] != "passed":
                said.append(row.get("reason", "").strip().splitlines()[-1] if row.get("reason") else "")
            text = ", ".join(filter(None, said)).replace("|", "\\|")
            lines.append(
                f"| {row['test'].removeprefix('tests/')} | {row['result']} | {row['seconds']} | {text} |"
            )
    return "\n".join(lines) + "\n"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
