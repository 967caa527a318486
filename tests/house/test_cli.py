"""`dsv3 <verb>`: the list, its speed, wrong verbs, and words that reach the verb's own main."""

import ast
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsv3_megatron import cli


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dsv3_megatron", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_lists_every_verb_with_one_line_and_is_fast():
    best = 9.0
    for _ in range(5):
        begun = time.perf_counter()
        result = run("--help")
        best = min(best, time.perf_counter() - begun)
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert set(lines) == set(cli.VERBS) and all(len(line) < 110 for line in lines.values())
    assert best < 0.5


def test_help_imports_neither_torch_nor_megatron():
    code = "import sys; from dsv3_megatron import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("wrong", "right"), [("shcedule", "schedule"), ("trian", "train"), ("docter", "doctor")]
)
def test_a_wrong_verb_names_the_nearest(wrong, right, capsys):
    assert cli.main([wrong]) == 2
    assert f"dsv3 {wrong}: no such verb; did you mean dsv3 {right}?" in capsys.readouterr().err


def test_a_verb_like_no_other_names_them_all(capsys):
    assert cli.main(["xyzzy"]) == 2
    assert "the verbs are train, " in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_is_a_function_of_its_module(verb):
    """By reading: importing them all would import everything."""
    module, _, function = cli.VERBS[verb].function.partition(":")
    spec = find_spec(f"dsv3_megatron.{module}")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_words_reach_the_verb():
    result = run("schedule", "dualpipe", "--ranks", "4", "--microbatches", "8", "--text-only")
    assert result.returncode == 0 and "makespan 26" in result.stdout
    wrong = run("schedule", "dualpipe", "--ranks", "5")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


def test_the_console_script_is_the_same_function():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert "dsv3 = dsv3_megatron.cli:main" in setup


def test_a_reader_that_has_read_enough_gets_no_traceback():
    """`dsv3 … | head`: the pipe is closed before anything is printed."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dsv3_megatron",
            "schedule",
            "dualpipe",
            "--ranks",
            "4",
            "--microbatches",
            "8",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout and child.stderr
    child.stdout.close()
    said = child.stderr.read()
    assert child.wait() == 128 + 13 and said == ""
