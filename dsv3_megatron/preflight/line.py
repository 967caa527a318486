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
from dataclasses import dataclass, field
from typing import Literal

from dsv3_megatron.errors import RefusedArgument

Trainer = Literal["train", "hydra", "pretrain_gpt"]

_ASSIGNMENT = re.compile(r"^[A-Z_][A-Z0-9_]*=")
_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_MODULES: dict[str, Trainer] = {
    "dsv3_megatron.train": "train",
    "dsv3_megatron.train_hydra": "hydra",
}
_VERBS: dict[str, Trainer] = {"train": "train", "train-hydra": "hydra"}


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
        RefusedArgument: no trainer of ours is in it.
    """
    words = _split(words[0]) if len(words) == 1 and " " in words[0].strip() else list(words)
    env: dict[str, str] = {}
    while words and _ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    if not words:
        raise RefusedArgument(
            "preflight: there is no launch line. Use dsv3 preflight torchrun … -m dsv3_megatron.train …"
        )
    if words[0].startswith("-") and words[0] not in ("-m", "-u"):
        return Line("train", tuple(words), env=env)
    if all("=" in word or word.startswith("~") for word in words):
        return Line("hydra", tuple(words), env=env)
    at = next((i for i, word in enumerate(words) if _name(word) in _LAUNCHERS), None)
    if at is None:
        trainer, rest = _program(words)
        return Line(trainer, tuple(rest), env=env)
    return _launched(words[at + 1 :], env)


def _split(text: str) -> list[str]:
    """As a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RefusedArgument(f"launch line {text[:60]} …: {error}; write it as a shell takes it") from error


def _launched(words: list[str], env: dict[str, str]) -> Line:
    """The line behind `torchrun`, read by torchrun's own parser."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    wrong: list[str] = []
    parser.error = wrong.append  # type: ignore[method-assign, assignment]
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
    if per_node.isdigit():
        return Line(trainer, tuple(rest), nodes, int(per_node), env, notes)
    return Line(trainer, tuple(rest), nodes, None, env, (*notes, f"--nproc-per-node {per_node}: a GPU each"))


def _nodes(text: str) -> tuple[int, tuple[str, ...]]:
    lowest, _, highest = str(text).partition(":")
    if not lowest.isdigit() or (highest and not highest.isdigit()):
        raise RefusedArgument(f"--nnodes {text}: a number, or MIN:MAX")
    if highest and highest != lowest:
        return int(highest), (f"--nnodes {text}: checked for {highest}; a layout fits one size only",)
    return int(lowest), ()


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
    raise RefusedArgument(
        f"launch line {shlex.join(words[:6])} …: starts no trainer of ours. Use -m dsv3_megatron.train, "
        "-m dsv3_megatron.train_hydra or pretrain_gpt.py --spec dsv3"
    )


def _name(word: str) -> str:
    return word.rsplit("/", 1)[-1]
