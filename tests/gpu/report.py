"""pytest plugin: what ran, with which result and figures, as JSON and Markdown.

A test adds a figure with pytest's own `record_property(name, value)`.
"""

import importlib.metadata
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("dsv3_megatron", "megatron-core", "torch", "transformer-engine", "triton")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", default=None, help="folder to write report.json and report.md into")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu-report"):
        config.pluginmanager.register(Report(Path(config.getoption("--gpu-report"))), "gpu-report")


class Report:
    """Collects one row per test and writes them when the session ends, whatever its result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.rows.setdefault(
            report.nodeid, {"test": report.nodeid, "result": "not run", "seconds": 0.0}
        )
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        # Set-up and tear-down count only where they go wrong, or skip.
        if report.when == "call" or report.outcome != "passed":
            if row["result"] != "failed":
                row["result"] = report.outcome
            row["figures"] = dict(report.user_properties)
            if report.outcome != "passed":
                row["reason"] = str(report.longrepr)[-2000:]

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        results = [row["result"] for row in self.rows.values()]
        record = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "exit_status": int(exitstatus),
            "counts": {result: results.count(result) for result in sorted(set(results))},
            "machine": machine(),
            "tests": list(self.rows.values()),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "report.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
        (self.folder / "report.md").write_text(markdown(record))


def machine() -> dict[str, Any]:
    """GPUs as the driver names them, package versions, commit."""
    return {
        "gpus": _output(
            "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
        ),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _output("git", "rev-parse", "HEAD"),
    }


def markdown(record: dict[str, Any]) -> str:
    """The report for people: machine, then a row per test."""
    machine_rows = [f"- {name}: {value}" for name, value in record["machine"]["versions"].items()]
    lines = ["# GPU tests", "", f"{record['date']}, commit {record['machine']['commit'] or 'unknown'}", ""]
    lines += [f"- GPU: {gpu}" for gpu in (record["machine"]["gpus"] or "none").splitlines()]
    lines += [*machine_rows, f"- results: {record['counts'] or 'no test ran'}", ""]
    lines += ["| test | result | seconds | figures |", "|---|---|---|---|"]
    for row in record["tests"]:
        figures = ", ".join(f"{name} = {value}" for name, value in row.get("figures", {}).items())
        lines.append(f"| {row['test']} | {row['result']} | {row['seconds']} | {figures} |")
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
