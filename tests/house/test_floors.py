"""The law of the floors holds, and breaks where it should: contracts of pyproject.toml over a copy of the package."""

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

PLANTED = {
    "upward": ("pipeline/actions.py", "from dsv3_megatron.plan import job", "no import runs up"),
    "upward, inside a function": (
        "fp8/tiles.py",
        "def f():\n    from dsv3_megatron.arguments import settings",
        "no import runs up",
    ),
    "beside, the wrong way": ("dualpipe/ranks.py", "from dsv3_megatron.resilience import watch", "no import"),
    "circle of files": ("plan/job.py", "from dsv3_megatron.plan import step", "circle"),
    "Megatron on the ground": ("pipeline/fit.py", "import megatron.core.utils", "knows no Megatron"),
    "torch.distributed in pure logic": (
        "pipeline/runner.py",
        "def f():\n    from torch import distributed",
        "torch.distributed",
    ),
    "a folder on no floor": ("attic/__init__.py", "", "attic"),
}


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = "from importlinter.cli import lint_imports_command as lint; lint()"
    words = [sys.executable, "-c", command, "--no-logo", "--no-cache"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    ignored = shutil.ignore_patterns("__pycache__", "*.yaml")
    shutil.copytree(REPOSITORY / "dsv3_megatron", folder / "dsv3_megatron", ignore=ignored)
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts", ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def test_the_house_keeps_its_law(copy):
    result = lint(copy)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 kept, 0 broken" in result.stdout


NO_FLOOR = "a folder on no floor"  # stops the contract before it looks at an import


@contextmanager
def planted(copy: Path, names: Iterable[str], inside: bool = False) -> Iterator[None]:
    """The lines in their files, for as long as it lasts; `inside` functions the package can still be imported."""
    before = {}
    for name in names:
        file, line, _ = PLANTED[name]
        if inside and not line.startswith("def"):
            line = f"def planted():\n    {line}"
        path = copy / "dsv3_megatron" / file
        before[path] = path.read_text() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text((before[path] or "") + "\n" + line + "\n")
    try:
        yield
    finally:
        for path, text in before.items():
            if text is None:
                shutil.rmtree(path.parent)
            else:
                path.write_text(text)


def test_planted_imports_break_it(copy):
    """All at once: each is named by its file, under the contract that it breaks."""
    names = [name for name in PLANTED if name != NO_FLOOR]
    with planted(copy, names, inside=True):
        result = lint(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    report = result.stdout.split("Broken contracts")[1]
    for name in names:
        file, _, broken = PLANTED[name]
        assert broken in report, name
        assert f".{file.removesuffix('.py').replace('/', '.').split('.')[1]}" in report, name


@pytest.mark.parametrize(
    "name", [name if name == NO_FLOOR else pytest.param(name, marks=pytest.mark.slow) for name in PLANTED]
)
def test_a_planted_import_breaks_it(copy, name):
    with planted(copy, [name]):
        result = lint(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert PLANTED[name][2] in result.stdout + result.stderr


def test_at_most_two_exceptions():
    import tomllib

    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    exceptions = {line for contract in contracts for line in contract.get("ignore_imports", [])}
    assert len(exceptions) <= 2
