"""A launch line as people write it: which trainer it starts, with which words, on how many processes.

[NAME=VALUE ...] [srun ...] torchrun [options] -m dsv3_megatron.train --spec dsv3 ...
... -m dsv3_megatron.train_hydra model=v3_671b layout=pp16_ep64
... pretrain_gpt.py --spec dsv3 ...
--spec dsv3 ...                              Megatron's arguments alone
model=v3_671b layout=pp16_ep64               overrides alone
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal

from dsv3_megatron.adopt.launcher import TORCHRUN
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.preflight.machine import USAGE

Trainer = Literal["train", "hydra", "pretrain_gpt"]

_ASSIGNMENT = re.compile(r"^[A-Z_][A-Z0-9_]*=")
_IN_SMALL = re.compile(r"^[a-z_][a-z0-9_]*=")
_MODULES: dict[str, Trainer] = {
    "dsv3_megatron.train": "train",
    "dsv3_megatron.train_hydra": "hydra",
}
SHELL = ("&&", "||", "|", ";", "&", ">", ">>", "<", "2>&1", "&>")
_VERBS: dict[str, Trainer] = {"train": "train", "train-hydra": "hydra"}


class NoTrainer(RefusedArgument):
    """A line that starts none of ours."""


@dataclass(frozen=True)
class Line:
    """What a launch line says.

    Attributes:
        trainer: who reads `words`.
        words: the trainer's arguments (for "hydra": its overrides).
        nodes, per_node: as the launcher gives them, None where it does not.
        env: variables that are set on the line.
        notes: what in it could not be taken literally.
    """

    trainer: Trainer
    words: tuple[str, ...]
    nodes: int | None = None
    per_node: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read(words: Sequence[str]) -> Line:
    """The parts of a launch line.

    Args:
        words: as the shell split them, or the whole line as one word.

    Raises:
        RefusedArgument: more than one command; `NoTrainer`: none of ours.
    """
    words = (
        _split(words[0]) if len(words) == 1 else list(words) if any(word.strip() for word in words) else []
    )
    shells = [word for word in words if word in SHELL or word.endswith(";")]
    if shells:
        raise RefusedArgument(
            f"launch line: {shells[0]!r} is the shell's, and what is checked is one command. Use dsv3 preflight for "
            "each trainer, with its words alone"
        )
    env: dict[str, str] = {}
    while words and _ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    if not words:
        raise NoTrainer(
            "preflight: there is no launch line. Use dsv3 preflight torchrun … -m dsv3_megatron.train …"
        )
    if words[0].startswith("-") and words[0] not in ("-m", "-u"):
        return Line("train", tuple(words), env=env)
    if all("=" in word or word.startswith("~") for word in words):
        return Line("hydra", tuple(words), env=env)
    notes = []
    while _IN_SMALL.match(words[0]):  # the shell would make it a variable; it may be meant for us
        name, _, env[name] = words[0].partition("=")
        near = get_close_matches(name, [*USAGE, "output"], n=1, cutoff=0.75)
        if near:
            raise RefusedArgument(f"{words[0]}: no such name. Use {near[0]}={env[name]}")
        notes.append(f"{words.pop(0)}: taken for a variable of the job; names of ours are {', '.join(USAGE)}")
    at = next((i for i, word in enumerate(words) if _name(word) in TORCHRUN), None)
    if at is None:
        trainer, rest = _program(words)
        return Line(trainer, tuple(rest), env=env, notes=tuple(notes))
    launched = _launched(words[at + 1 :], env)
    return replace(launched, notes=(*notes, *launched.notes))


def _split(line: str) -> list[str]:
    """The words of a line, as a shell would split it; it may go on after a backslash."""
    try:
        return shlex.split(line.replace("\\\n", " "))
    except ValueError as error:
        raise RefusedArgument(f"launch line: {error}. Use a whole line") from error


def _launched(words: list[str], env: dict[str, str]) -> Line:
    """The line behind `torchrun`, read by torchrun's own parser."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    wrong: list[str] = []
    parser.error = wrong.append  # type: ignore[method-assign, assignment]
    parser.print_help = lambda file=None: wrong.append("it would print its help")  # type: ignore[method-assign]
    try:
        options = parser.parse_args(words)
    except (SystemExit, TypeError) as error:
        raise RefusedArgument(f"torchrun: {wrong[0] if wrong else error}") from error
    if wrong:
        raise RefusedArgument(f"torchrun: {wrong[0]}")
    module = ["-m"] if options.module else []
    trainer, rest = _program([*module, options.training_script, *options.training_script_args])
    nodes, notes = _nodes(options.nnodes)
    per_node = str(options.nproc_per_node)
    if _is_count(per_node):
        return Line(trainer, tuple(rest), nodes, int(per_node), env, notes)
    if per_node not in ("gpu", "auto"):
        raise RefusedArgument(
            f"--nproc-per-node {per_node}: no number of GPUs. Use a number from 1 on, or gpu"
        )
    return Line(trainer, tuple(rest), nodes, None, env, (*notes, f"--nproc-per-node {per_node}: a GPU each"))


def _nodes(text: str) -> tuple[int, tuple[str, ...]]:
    lowest, colon, highest = str(text).partition(":")
    if not _is_count(lowest) or (colon and not (_is_count(highest) and int(lowest) <= int(highest))):
        raise RefusedArgument(f"--nnodes {text}: no number of machines. Use a number from 1 on, or MIN:MAX")
    if colon and highest != lowest:
        return int(highest), (f"--nnodes {text}: checked for {highest}; a layout fits one size only",)
    return int(lowest), ()


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _program(words: list[str]) -> tuple[Trainer, list[str]]:
    """The trainer and its words, from the first word that names one."""
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if word in _MODULES and before == "-m":
            return _MODULES[word], words[i + 1 :]
        if _name(word) in ("dsv3", "dsv3_megatron") and i + 1 < len(words) and words[i + 1] in _VERBS:
            return _VERBS[words[i + 1]], words[i + 2 :]
        if _name(word).startswith("pretrain_") and word.endswith(".py"):
            return "pretrain_gpt", words[i + 1 :]
    raise NoTrainer(
        f"launch line {shlex.join(words[:6])} …: starts no trainer of ours. Use -m dsv3_megatron.train, "
        "-m dsv3_megatron.train_hydra or pretrain_gpt.py --spec dsv3"
    )


def _name(word: str) -> str:
    return word.rsplit("/", 1)[-1]
