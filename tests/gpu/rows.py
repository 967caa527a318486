"""pytest plugin of a step: one row per test, in a file that is written after every test.

A test adds a figure with pytest's own `record_property(name, value)`. What ran before a limit or a crash is kept; a
test that the file says has passed is not run again.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-rows", default=None, help="file for the rows of this pytest process")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu-rows"):
        config.pluginmanager.register(Rows(Path(config.getoption("--gpu-rows"))), "gpu-rows")


class Rows:
    """One row per test, written after each; tests that the file says have passed are left out."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}
        if file.exists():
            self.rows = {
                row["test"]: row for row in json.loads(file.read_text()) if row["result"] == "passed"
            }

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self.rows]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self.rows]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.rows[nodeid] = {"test": nodeid, "result": "not finished", "seconds": 0.0, "figures": {}}
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.rows[report.nodeid]
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        # Set-up and tear-down count only where they go wrong, or skip.
        if report.when == "call" or report.outcome != "passed":
            if row["result"] != "failed":
                row["result"] = report.outcome
            row["figures"] = {name: _plain(value) for name, value in report.user_properties}
            if report.outcome != "passed":
                said = report.longrepr  # of a skipped test: file, line, reason
                row["reason"] = said[2] if isinstance(said, tuple) else str(said)[-2000:]
        if report.when == "teardown":
            self._write()

    def _write(self) -> None:
        write(self.file, json.dumps(list(self.rows.values()), indent=1))


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
