"""`dsv3 prove`: is it what I think it is?

    dsv3 prove --hf DIR --megatron DIR [--positions 0,-1] [--prompt TEXT] [--no-logits]
    dsv3 prove resume [--steps N] LAUNCH LINE      2N steps equal N steps, a checkpoint, N steps
    dsv3 prove layout LAUNCH LINE                  gradients of this layout equal those of one process
    dsv3 prove commit OLD NEW [LAUNCH LINE]        losses and gradient norms of two installed versions
    dsv3 prove fp8 --megatron DIR | --hf DIR       BF16 → FP8 → BF16: error of each tensor, drift of the logits
                   [--beside DIR]                  and of another checkpoint, trained in BF16 for instance

Each takes --output DIR (default: prove-KIND) and --json, and ends in one word: proved, refuted, incomplete. The
folder holds report.md, report.json and what was compared, without weights, paths or names of machines and users. Exit
status 0 when proved, 1 else.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.prove.report import Report, new_folder

# All of it is work for the CPU, also where there is a GPU. Before torch is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prove; returns 0 when proved."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]) or not words:
        print(__doc__)
        return 0
    verb = words.pop(0) if words[0] in _VERBS else "checkpoint"
    if verb == "checkpoint" and not words[0].startswith("-"):
        raise RefusedArgument(
            f"dsv3 prove {words[0]}: give --hf DIR --megatron DIR, or one of {', '.join(_VERBS)}"
        )
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _ended)
    try:
        return _VERBS.get(verb, _checkpoint)(words)
    except KeyboardInterrupt:
        again = (
            "the same command goes on with the next tensor"
            if verb == "checkpoint"
            else "no report was written"
        )
        print(f"interrupted: {again}", file=sys.stderr)
        return 130


def _ended(*_: Any) -> NoReturn:
    """As on the terminal: what was started is ended, what was made beside a model is removed."""
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RefusedArgument(f"{self.prog}: {message} (all options: dsv3 prove --help)")


def _parser(kind: str) -> _Parser:
    parser = _Parser(prog=f"dsv3 prove {kind}".removesuffix(" checkpoint"), allow_abbrev=False)
    parser.add_argument(
        "--output", type=Path, default=Path(f"prove-{kind}"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="the report as one JSON object on the last line")
    return parser


def _end(report: Report, options: argparse.Namespace, private: dict[str, str]) -> int:
    written = report.write(options.output, private)
    for check in report.checks:
        mark = {True: "holds", False: "FAILS", None: "not done"}[check.holds]
        worst = "" if check.worst is None else f", worst {check.worst:.3g}"
        print(
            f"{check.name}: {mark} ({check.count} compared{worst}) {check.detail}".rstrip(), file=sys.stderr
        )
    print(f"{options.output}: report.md, report.json", file=sys.stderr)
    if options.json:
        print(json.dumps(written))
    else:
        print(report.word)
    return 0 if report.word == "proved" else 1


def private_words(**folders: Path | None) -> dict[str, str]:
    """Paths that must not be in a report, as given and in full, by what stands for them."""
    found: dict[str, str] = {}
    for name, folder in folders.items():
        if folder is not None:
            found |= {str(folder.resolve()): f"<{name}>"}
            if os.sep in str(folder):  # a single word is no secret, and may be a tensor's
                found |= {str(folder): f"<{name}>"}
    return found


def _folder(option: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise RefusedArgument(f"{option} {folder}: no such folder")
    return folder


def _checkpoint(words: list[str]) -> int:
    parser = _parser("checkpoint")
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--megatron", type=Path, required=True)
    parser.add_argument(
        "--positions", type=_numbers, help="places in each prompt, for example 0,7,-1 (default: all)"
    )
    _add_prompt(parser)
    parser.add_argument(
        "--no-logits", action="store_true", help="compare the tensors only; the word is incomplete"
    )
    options = parser.parse_args(words)
    for option, folder in (("--hf", options.hf), ("--megatron", options.megatron)):
        _folder(option, folder)
    new_folder(options.output)
    from dsv3_megatron.prove.checkpoint import audit

    unfinished = options.output.with_name(options.output.name + ".part.jsonl")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedArgument(f"--output {options.output}: {error.strerror}") from error
    with contextlib.redirect_stdout(sys.stderr):
        report = audit(
            options.hf, options.megatron, options.positions, options.prompt, not options.no_logits, unfinished
        )
    status = _end(report, options, private_words(hf=options.hf, megatron=options.megatron))
    unfinished.unlink(missing_ok=True)
    return status


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers, as in 0,7,-1") from None


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("holds no text")
    return text


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", type=_prompt, metavar="TEXT", help="may be repeated (default: a few)"
    )


def _add_steps(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    parser.add_argument(
        "--steps", type=_steps, default=default, metavar="N", help=f"{what} (default: {default})"
    )


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 1 or more")
    return int(text)


def _bound(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number, 0 or more")
    return value


def _own(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """How many of the words, from the first on, are our own options and their values."""
    own = {option: action for action in parser._actions for option in action.option_strings}
    place = 0
    while place < len(words) and (action := own.get(words[place].partition("=")[0])) is not None:
        place += 1 if action.nargs == 0 or "=" in words[place] else 2
    return place


def _line(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, which come first, and the launch line behind them."""
    place = _own(parser, words)
    options, line = parser.parse_args(words[:place]), words[place:]
    line = line[1:] if line[:1] == ["--"] else line
    if not line:
        raise RefusedArgument(
            f"{parser.prog}: there is no launch line: give torchrun … -m dsv3_megatron.train …"
        )
    late = [
        word for word in line if word.partition("=")[0] in ("--output", "--json", "--steps", "--same-layout")
    ]
    if late:
        raise RefusedArgument(f"{parser.prog}: {late[0]}: our own options stand before the launch line")
    new_folder(options.output)
    return options, line


def _quiet_cpu() -> None:
    """Megatron is imported to read the line: on the CPU, its words on stderr."""
    from dsv3_megatron import cpu

    cpu.activate()


def _resume(words: list[str]) -> int:
    parser = _parser("resume")
    _add_steps(parser, 2, "before and after")
    parser.add_argument("--same-layout", action="store_true", help="do not also resume in one process")
    options, line = _line(parser, words)
    _quiet_cpu()
    from dsv3_megatron.prove.resume import prove_resume

    with contextlib.redirect_stdout(sys.stderr):
        report = prove_resume(line, options.steps, not options.same_layout)
    return _end(report, options, {})


def _layout(words: list[str]) -> int:
    options, line = _line(_parser("layout"), words)
    _quiet_cpu()
    from dsv3_megatron.prove.layout import prove_layout

    with contextlib.redirect_stdout(sys.stderr):
        report = prove_layout(line)
    return _end(report, options, {})


def _commit(words: list[str]) -> int:
    parser = _parser("commit")
    _add_steps(parser, 5, "that both train")
    parser.add_argument(
        "--bound", type=_bound, default=1e-5, help="relative, of a loss or norm (default: %(default)s)"
    )
    before = _own(parser, words)
    parser.parse_args(words[:before])  # --help, and what is wrong with them
    versions = list(itertools.takewhile(lambda word: not word.startswith("-"), words[before : before + 2]))
    if len(versions) < 2 or not all(version.strip() for version in versions):
        raise RefusedArgument(
            f"{' '.join([parser.prog, *versions])}: give OLD and NEW: what pip installs (megatron-core==0.19.1, a "
            "folder, git+https://…@commit), or here"
        )
    rest = words[before + 2 :]
    behind = _own(parser, rest)
    options = parser.parse_args([*words[:before], *rest[:behind]])
    line = rest[behind:]
    new_folder(options.output)
    _quiet_cpu()
    from dsv3_megatron.prove.commit import prove_commit

    line = line[1:] if line[:1] == ["--"] else line
    with contextlib.redirect_stdout(sys.stderr):
        report = prove_commit(versions[0], versions[1], line, options.steps, options.bound)
    paths = {word: "<version>" for word in versions if os.sep in word and Path(word).exists()}
    return _end(report, options, paths)


def _fp8(words: list[str]) -> int:
    parser = _parser("fp8")
    parser.add_argument("--hf", type=Path)
    parser.add_argument("--megatron", type=Path)
    parser.add_argument(
        "--beside", type=Path, metavar="DIR", help="another checkpoint whose drift stands beside this one's"
    )
    parser.add_argument(
        "--bound", type=_bound, default=0.1, help="of the drift of the logits (default: %(default)s)"
    )
    _add_prompt(parser)
    parser.add_argument("--no-logits", action="store_true", help="the tensors only; the word is incomplete")
    options = parser.parse_args(words)
    if (options.hf is None) == (options.megatron is None):
        raise RefusedArgument("dsv3 prove fp8: give --megatron DIR or --hf DIR, one of the two")
    _folder("--hf" if options.hf else "--megatron", options.hf or options.megatron)
    if options.beside is not None:
        _folder("--beside", options.beside)
        if options.no_logits:
            raise RefusedArgument("--beside: its logits are what it is for; leave out --no-logits")
    new_folder(options.output)
    from dsv3_megatron.prove.fp8 import prove_fp8

    with contextlib.redirect_stdout(sys.stderr):
        report = prove_fp8(
            options.megatron,
            options.hf,
            not options.no_logits,
            bound=options.bound,
            beside=options.beside,
            prompts=options.prompt,
        )
    named = private_words(hf=options.hf, megatron=options.megatron, beside=options.beside)
    return _end(report, options, named)


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "resume": _resume,
    "layout": _layout,
    "commit": _commit,
    "fp8": _fp8,
}


if __name__ == "__main__":
    sys.exit(main())
