"""What an exception of Megatron's means for the command line: one line that names options, and what to do.

What can be known before the start is a row of the refusal table. The rest is found here: in the text of the exception,
in a short table of known ones, or in the condition that failed, whose names are those of options.
"""

import ast
import contextlib
import functools
import linecache
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dsv3_megatron.resilience.watch import FAILED_FIRST

__all__ = ["KNOWN", "Known", "explain", "options_of", "report", "write_traceback"]

MOST_OPTIONS = 4
_HOLDERS = {
    "args",
    "config",
    "cfg",
    "self",
    "ddp_config",
    "model_config",
    "optimizer_config",
    "transformer",
    "get_args",
}
_PACKAGES = ("megatron", "dsv3_megatron")
_UNHELPFUL = {"rank", "world_size", "help", "load", "save"}  # names that occur everywhere


@dataclass(frozen=True)
class Known:
    """A known exception.

    Attributes:
        kind: name of its class, "" for any.
        text: regular expression that its text must match.
        where: function that must be on the stack, "" for any.
        options: what to look at.
        use: what to do.
    """

    kind: str
    text: str
    where: str
    options: str
    use: str


KNOWN = (
    Known("OutOfMemoryError", "", "", "--micro-batch-size / --recompute-granularity / --pipeline-model-parallel-size",
          "less memory per rank; `dsv3 plan` shows what a layout needs"),
    Known("MemoryError", "", "", "--micro-batch-size / --pipeline-model-parallel-size", "less memory per process"),
    Known("PipelineTimeout", "", "", "--pipeline-timeout-s",
          "a longer time-out if the rank that is waited for is alive"),
    Known("BadStep", "", "", "--on-bad-step",
          "--on-bad-step skip or rewind to leave such steps out, or another --lr or data"),
    Known("SaveFailed", "", "", "--save", "a folder with room that every node can write to"),
    Known("", "CheckpointException|CheckpointingException|Missing key|size mismatch|shape mismatch", "load_checkpoint",
          "--load / --pretrained-checkpoint",
          "a checkpoint of this model that is whole, or the arguments it was saved with"),
    Known("KeyError", "", "load_checkpoint", "--load",
          "--no-load-optim or --finetune where only the weights are wanted"),
    Known("RuntimeError", "No rendezvous|address already in use|EADDRINUSE", "", "--master-port (of torchrun)",
          "another port"),
    Known("", "", "build_tokenizer", "--tokenizer-model / --tokenizer-type",
          "a folder with a tokenizer, as written by `dsv3 data`"),
    Known("", "", "train_valid_test_datasets", "--data-path / --train-data-path / --split",
          "prefixes whose .bin and .idx files are there and hold enough documents"),
    Known("ModuleNotFoundError", "", "", "an option that needs a package that is not installed",
          "pip install the package that is named, or leave the option out (all options: --help)"),
)  # fmt: skip


def explain(error: BaseException, parser: ArgumentParser, args: Namespace | None = None) -> str:
    """One line: options, what is wrong, what to do.

    Args:
        error: as it was caught.
        parser: knows the options' names.
        args: the arguments, as far as they are known, for the values.
    """
    frames = list(_frames(error.__traceback__))
    text = " ".join(str(error).split())
    known = _known(error, text, [frame.name for frame in frames])
    options = options_of(error, parser, args)
    condition = "" if text else _failed_condition(frames)
    what = text or (f"{condition} does not hold" if condition else "")
    what = what if isinstance(error, AssertionError) else f"{type(error).__name__}: {what or 'no text'}"
    if known is not None:
        subject = known.options if not options else ", ".join(options)
        return f"{subject}: {what}. Use {known.use}"
    if options:
        return f"{', '.join(options)}: {what}. Use other values, or leave out what DeepSeek-V3 does not need"
    where = f" (in {frames[-1].name}, {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{what}{where}: no option is known to lead there (all options: --help)"


def options_of(error: BaseException, parser: ArgumentParser, args: Namespace | None = None) -> list[str]:
    """The options that an exception is about, with their values; those that were given first."""
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in _UNHELPFUL}
    text = str(error)
    named = [a.dest for a in parser._actions if _mentioned(a, text)]
    names = [
        name for name in re.findall(r"[a-z0-9]+(?:[_-][a-z0-9]+)+", text) if name.replace("-", "_") in actions
    ]
    found = [*named, *(name.replace("-", "_") for name in names)]
    if isinstance(error, ModuleNotFoundError) and error.name:  # options that speak of the package
        package = error.name.partition(".")[0].lower()
        found += [a.dest for a in actions.values() if package in f"{a.option_strings} {a.help}".lower()]
    if not found:
        for frame in reversed(list(_frames(error.__traceback__))):
            found = [name for name in _names_in_condition(frame) if name in actions]
            if found:
                break
    unique = list(dict.fromkeys(found))
    by_dest = {a.dest: a for a in parser._actions}
    unique.sort(key=lambda dest: not _was_given(by_dest[dest], args))
    return [_with_value(by_dest[dest], args) for dest in unique[:MOST_OPTIONS]]


def _mentioned(action: Action, text: str) -> bool:
    return any(re.search(re.escape(option) + r"(?![\w-])", text) for option in action.option_strings)


def _was_given(action: Action, args: Namespace | None) -> bool:
    return args is not None and getattr(args, action.dest, action.default) != action.default


def _with_value(action: Action, args: Namespace | None) -> str:
    option = action.option_strings[0]
    value = getattr(args, action.dest, None) if args is not None else None
    if action.nargs == 0 or value is None or not isinstance(value, str | int | float | list):
        return option
    return f"{option} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _known(error: BaseException, text: str, functions: Iterable[str]) -> Known | None:
    functions = set(functions)
    for row in KNOWN:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if row.kind and row.kind not in kinds:
            continue
        if row.where and row.where not in functions:
            continue
        if row.text and not re.search(row.text, f"{type(error).__name__} {text}", re.IGNORECASE):
            continue
        return row
    return None


@dataclass(frozen=True)
class _Frame:
    filename: str
    lineno: int
    name: str


def _frames(trace: TracebackType | None) -> Iterator[_Frame]:
    """The frames in Megatron and in this package, outermost first."""
    while trace is not None:
        code = trace.tb_frame.f_code
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in _PACKAGES:
            yield _Frame(code.co_filename, trace.tb_lineno, code.co_name)
        trace = trace.tb_next


def _failed_condition(frames: list[_Frame]) -> str:
    """The text of the assertion that failed, "" where the innermost frame is no assertion."""
    for node in _statements(frames[-1]) if frames else ():
        if isinstance(node, ast.Assert):
            return ast.unparse(node.test)
    return ""


def _names_in_condition(frame: _Frame) -> list[str]:
    """Names of arguments in a statement, and in the conditions under which it is reached."""
    parts: list[ast.AST] = []
    for statement in _statements(frame):
        if isinstance(statement, ast.If | ast.While):
            parts.append(statement.test)
        elif isinstance(statement, ast.Assert):
            parts += [statement.test, *([statement.msg] if statement.msg is not None else [])]
        elif not isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.With | ast.For | ast.Try):
            parts.append(statement)
    names = []
    for part in parts:
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute) and _root(node.value) in _HOLDERS:
                names.append(node.attr)
    return names


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    if isinstance(node, ast.Call):
        return _root(node.func)
    return node.id if isinstance(node, ast.Name) else ""


def _statements(frame: _Frame) -> list[ast.stmt]:
    """The statements around a line of a file, innermost first."""
    around = [
        node
        for node in _all_statements(frame.filename)
        if node.lineno <= frame.lineno <= (node.end_lineno or node.lineno)
    ]
    return sorted(around, key=lambda node: (node.end_lineno or node.lineno) - node.lineno)


@functools.cache
def _all_statements(filename: str) -> list[ast.stmt]:
    """Every statement of a file, none where it is no Python."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def report(error: Exception) -> str:
    """What a rank that failed prints: one line, and where the traceback is. "" where another rank tells of it.

    All ranks fail alike before they talk to each other (rank 0 speaks), and later one fails first (it speaks).
    """
    from dsv3_megatron.arguments.command_line import megatron_parser

    rank, args = int(os.environ.get("RANK", "0")), _megatron_args()
    file = write_traceback(error, rank, Path(args.save) if args is not None and args.save else None)
    first = getattr(error, FAILED_FIRST, rank == 0 or isinstance(error, OSError))
    if not first:
        return ""
    try:
        text = explain(error, megatron_parser(), args)
    except Exception as problem:  # nothing may hide the error itself
        text = f"{type(error).__name__}: {' '.join(str(error).split())} (not explained: {problem!r})"
    speaker = "error" if rank == 0 else f"error on rank {rank}"
    return f"{speaker}: {text}. The traceback is in {file}"


def write_traceback(error: BaseException, rank: int, folder: Path | None = None) -> str:
    """Write the traceback to a file of its own, in `folder` if that can be written to; its path."""
    text = "".join(traceback.format_exception(error))
    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-rank{rank}-{os.getpid()}.txt"
    for place in (folder, Path(tempfile.gettempdir())):
        if place is None:
            continue
        with contextlib.suppress(OSError):
            (place / name).write_text(f"{shlex.join(sys.argv)}\n\n{text}")
            return str(place / name)
    return "no file: nothing can be written to " + tempfile.gettempdir()


def _megatron_args() -> Namespace | None:
    """Megatron's arguments of this process, None before it has parsed them."""
    try:
        from megatron.training import get_args

        return get_args()
    except (ImportError, AssertionError):
        return None
