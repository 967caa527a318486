"""Exceptions of Megatron's as one line: which options it names, what it says to do, where the traceback is."""

import ast
import inspect
import re
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron import patching
from dsv3_megatron.arguments import failures, megatron_parser
from dsv3_megatron.arguments.failures import KNOWN, _Frame, _names_in_condition, explain, options_of, report
from dsv3_megatron.errors import RefusedArgument, ends_in_one_line
from dsv3_megatron.resilience.watch import FAILED_FIRST
from tests.resilience.ranks import SCHEDULES, WORDS, run_to_the_end


@pytest.fixture(scope="module")
def parser() -> Any:
    return megatron_parser()


def raised(function: Any, *args: Any, **kwargs: Any) -> BaseException:
    with pytest.raises(Exception) as caught:
        function(*args, **kwargs)
    return caught.value


def test_an_assertion_without_a_text_names_the_arguments_in_its_condition(parser: Any) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-3, min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=1, lr_decay_style="cosine",
        start_wd=0.1, end_wd=0.1, wd_incr_steps=1, wd_incr_style="constant",
    )  # fmt: skip
    schedule.lr_decay_style = "no such"
    error = raised(schedule.step, 1)
    text = explain(error, parser, Namespace(lr_decay_style="no such"))
    assert "--lr-decay-style no such" in text and "\n" not in text


def test_options_in_the_text_come_first(parser: Any) -> None:
    error = raised(eval, "int('x')")
    error.args = ("cannot combine --moe-router-topk with num_experts: see expert_model_parallel_size",)
    assert options_of(error, parser, Namespace(num_experts=8)) == [
        "--num-experts 8",
        "--moe-router-topk",
        "--expert-model-parallel-size",
    ]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "--micro-batch-size"),
        (
            ModuleNotFoundError("No module named 'nvtx'", name="nvtx"),
            "--nvtx-ranges: ModuleNotFoundError: No module",
        ),
        (ModuleNotFoundError("No module named 'odd'", name="odd"), "No module named 'odd'. Use pip install"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (KeyError("optimizer"), "KeyError: 'optimizer'"),
        (RuntimeError("first line\n  second line"), "RuntimeError: first line second line"),
        (ZeroDivisionError(), "ZeroDivisionError: no text"),
    ],
)
def test_other_exceptions(error: Exception, text: str, parser: Any) -> None:
    line = explain(error, parser)
    assert text in line and "\n" not in line and re.search(r"--[a-z]|all options: --help", line)


def test_the_options_of_known_exceptions_exist(parser: Any) -> None:
    known = {option for action in parser._actions for option in action.option_strings}
    for row in KNOWN:
        for option in re.findall(r"--[\w-]+", f"{row.options} {row.use}"):
            assert option in known or option == "--master-port", option


def conditions(function: Any) -> list[tuple[str, int, str]]:
    """(file, line, text) of every assertion and every raise in a function of Megatron's."""
    lines, first = inspect.getsourcelines(function)
    file = inspect.getsourcefile(function)
    tree = ast.parse("".join(lines) if not lines[0].startswith(" ") else "if True:\n" + "".join(lines))
    offset = first - 1 - (1 if lines[0].startswith(" ") else 0)
    assert file is not None
    return [
        (file, node.lineno + offset, ast.unparse(node)[:100])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert | ast.Raise)
    ]


def test_most_conditions_of_megatrons_validation_name_an_option(parser: Any) -> None:
    """Every assertion where Megatron checks arguments, asked for the options that it is about."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
    from megatron.training import arguments

    functions = [arguments.validate_args, TransformerConfig.__post_init__, MLATransformerConfig.__post_init__]
    actions = {action.dest for action in parser._actions}
    found, unnamed = 0, []
    for function in map(patching.unpatched, functions):
        for file, line, text in conditions(function):
            names = [n for n in _names_in_condition(_Frame(file, line, "validate")) if n in actions]
            found += 1
            if not names and not re.search(r"--[a-z]", text):
                unnamed.append(text)
    assert found > 200 and len(unnamed) < 0.08 * found, (found, len(unnamed), unnamed)


def test_the_traceback_is_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = Namespace(save=str(tmp_path), micro_batch_size=3)
    monkeypatch.setattr(failures, "_megatron_args", lambda: args)
    line = report(raised(eval, "1 / 0"))  # type: ignore[arg-type]
    assert line.startswith("error: ZeroDivisionError: division by zero") and "\n" not in line
    file = Path(line.rpartition("The traceback is in ")[2])
    assert file.parent == tmp_path and "Traceback (most recent call last)" in file.read_text()
    args.save = str(tmp_path / "nowhere")
    line = report(raised(eval, "1 / 0"))  # type: ignore[arg-type]
    file = Path(line.rpartition("The traceback is in ")[2])
    assert "ZeroDivisionError" in file.read_text() and file.parent != tmp_path
    file.unlink()


def test_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(failures, "_megatron_args", lambda: Namespace(save=str(tmp_path)))
    error = ValueError("x")
    monkeypatch.setenv("RANK", "3")
    assert report(error) == ""
    setattr(error, FAILED_FIRST, True)
    assert report(error).startswith("error on rank 3: ValueError: x")
    monkeypatch.setenv("RANK", "0")
    setattr(error, FAILED_FIRST, False)
    assert report(error) == ""


def test_an_explanation_that_fails_hides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(failures, "_megatron_args", lambda: Namespace(save=str(tmp_path)))
    monkeypatch.setattr(failures, "explain", lambda *args: 1 / 0)
    assert report(ValueError("the error itself")).startswith("error: ValueError: the error itself")


def test_status_and_streams(capsys: pytest.CaptureFixture[str]) -> None:
    def main(error: BaseException | None) -> str:
        if error is not None:
            raise error
        return "done"

    command = ends_in_one_line(lambda error: f"error: told: {error}")(main)
    assert command(None) == "done"
    for error, status in ((RefusedArgument("--x 3: no"), 2), (ValueError("boom"), 1), (SystemExit(7), 7)):
        with pytest.raises(SystemExit) as left:
            command(error)
        assert left.value.code == status
    assert capsys.readouterr().err == "error: --x 3: no\nerror: told: boom\n"
    with pytest.raises(KeyboardInterrupt):
        command(KeyboardInterrupt())


def break_down(rank: int, where: int) -> None:
    """Fail at the third step of one rank, in Megatron's optimizer."""
    if rank != where:
        return
    from megatron.core.optimizer import optimizer as module

    original = module.MixedPrecisionOptimizer if False else module.ChainedOptimizer
    step, calls = original.step, []

    def failing(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third step\nfails")
        return step(self)

    original.step = failing


@pytest.mark.parametrize("where", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_run_that_breaks_down_says_so_in_one_line(where: int, tmp_path: Path) -> None:
    save = tmp_path / "save"
    words = [*WORDS, *SCHEDULES["1f1b"], "--train-iters", "6", "--save", str(save), "--save-interval", "5"]
    ended = run_to_the_end(tmp_path / "log", 2, words, partial(break_down, where=where))
    assert all(rank.status not in (0, None) for rank in ended)
    lines = [line for rank in ended for line in rank.output.splitlines()]
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 1 and "RuntimeError: the third step fails" in errors[0], errors
    assert errors[0].startswith("error: " if where == 0 else "error on rank 1: ")
    assert not any("Traceback (most recent call last)" in line for line in lines)
    assert "the third step" in Path(errors[0].rpartition("The traceback is in ")[2]).read_text()
    assert sys.exc_info() == (None, None, None)
