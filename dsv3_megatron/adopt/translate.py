"""From the options of a launch script to Megatron's, one by one: kept, renamed, left out, impossible, unknown."""

import re
from argparse import Action, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsv3_megatron.adopt.launcher import environment, size
from dsv3_megatron.adopt.rules import RULES, Blocked
from dsv3_megatron.arguments.foreign import foreign_options

__all__ = ["Launch", "Step", "launch_of", "translate"]

# Values that Megatron's options have elsewhere: (option, value) to words and why.
_HF = "--tokenizer-type HuggingFaceTokenizer"
_VALUES = {
    ("--tokenizer-type", "PretrainedFromHF"): (_HF, "its name in Megatron"),
    ("--tokenizer-type", "DeepSeekV2Tokenizer"): (_HF, "the released tokenizer"),
    ("--tokenizer-type", "DeepSeekV3Tokenizer"): (_HF, "the released tokenizer"),
    ("--optimizer", "hybridadam"): (
        "--optimizer adam",
        "AdamW; --optimizer-cpu-offload keeps it in host memory",
    ),
    ("--fp16", ""): ("--bf16", "the FP8 and BF16 of DeepSeek-V3; half precision is refused"),
    ("--transformer-impl", "local"): (
        "",
        "local is the plain reference backend here; on GPUs it is Transformer Engine's",
    ),
    ("--moe-token-dispatcher-type", "alltoall_seq"): (
        "--moe-token-dispatcher-type alltoall",
        "MindSpeed: the same exchange",
    ),
    ("--moe-token-dispatcher-type", "deepep"): (
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep",
        "its name in Megatron",
    ),
    ("--moe-router-load-balancing-type", "pai_megatron_aux_loss"): (
        "--moe-router-load-balancing-type aux_loss",
        "MindSpeed: its name in Megatron",
    ),
    ("--moe-router-load-balancing-type", "group_limited_greedy"): (
        "--moe-router-load-balancing-type aux_loss",
        "MindSpeed: --moe-router-num-groups limits the groups",
    ),
    ("--moe-router-load-balancing-type", "softmax_topk"): (
        "--moe-router-load-balancing-type none",
        "MindSpeed: its name in Megatron",
    ),
    ("--moe-router-load-balancing-type", "noaux_tc"): (
        "--moe-router-load-balancing-type none",
        "MindSpeed: the bias alone balances",
    ),
    ("--eval-iters", "-1"): ("--eval-iters 0", "no evaluation"),
    ("--fp8-recipe", "mxfp8"): (
        "--fp8-recipe dsv3",
        "DeepSeek-V3's quantisation (R§3.3.2) in place of MXFP8",
    ),
    ("--fp8-recipe", "tensorwise"): ("--fp8-recipe dsv3", "DeepSeek-V3's quantisation (R§3.3.2)"),
    ("--fp8-recipe", "delayed"): ("--fp8-recipe dsv3", "DeepSeek-V3's quantisation (R§3.3.2)"),
    ("--fp8-format", "hybrid"): (
        "--fp8-recipe dsv3",
        "DeepSeek-V3's quantisation: E4M3 throughout, tiles (R§3.3.2)",
    ),
}


# One of these is among a trainer's options; tools for checkpoints and data have none.
OF_TRAINERS = ("--micro-batch-size", "--global-batch-size", "--train-iters", "--train-samples", "--lr")
SCORES = "--moe-router-score-function"
HYDRA = "dsv3_megatron.train_hydra"  # takes overrides, no options


@dataclass(frozen=True)
class Launch:
    """How a script starts a trainer.

    Attributes:
        program: the Python file or module.
        options: what follows it, with values; in order, the last of a name counts.
        nodes, ranks_per_node: of torchrun or Slurm; None where not known.
        stray: words that belong to no option; the overrides of `dsv3_megatron.train_hydra`.
        env: variables that are set for it.
    """

    program: str
    options: dict[str, list[str]] = field(default_factory=dict)
    nodes: int | None = None
    ranks_per_node: int | None = None
    stray: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What becomes of one option.

    Attributes:
        option: as it stands in the script, with its value.
        kind: "kept", "becomes", "left out", "impossible", "unknown", "unknown value", "added".
        words: Megatron's.
        why: for people.
    """

    option: str
    kind: str
    words: tuple[str, ...] = ()
    why: str = ""


def launch_of(
    words: Sequence[str], slurm: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Launch | None:
    """A trainer's launch among the words of a command; None for another command.

    Args:
        slurm: options of the allocation in which it is started.
        env: variables that are set before.

    Raises:
        ValueError: a number of nodes or ranks is none.
    """
    at = program_at(words)
    if at is None:
        return None
    if words[at] != HYDRA and not any(word.split("=")[0] in OF_TRAINERS for word in words[at:]):
        return None
    nodes, ranks = size(words[:at], slurm)
    options, stray = ({}, list(words[at + 1 :])) if words[at] == HYDRA else options_of(words[at + 1 :])
    return Launch(words[at], options, nodes, ranks, tuple(stray), {**(env or {}), **environment(words[:at])})


def program_at(words: Sequence[str]) -> int | None:
    """Where the Python file or module stands that a command starts; None where there is none."""
    files = (i for i, word in enumerate(words) if word.endswith(".py"))
    modules = (i + 1 for i, word in reversed(list(enumerate(words[:-1]))) if word == "-m")
    return next(files, next(modules, None))


def options_of(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Values by option, those given last; and words before any option."""
    options: dict[str, list[str]] = {}
    stray: list[str] = []
    name = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, sign, value = word.partition("=")
            options.pop(name, None)  # the last one counts
            options[name] = [_plain(value)] if sign else []
        elif name:
            options[name].append(_plain(word))
        else:
            stray.append(word)
    return options, stray


def _plain(value: str) -> str:
    """Without quotes that a script carries inside a variable."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def translate(launch: Launch, parser: ArgumentParser) -> list[Step]:
    """What becomes of each option, in the script's order."""
    known = {option: action for action in parser._actions for option in action.option_strings}
    steps = []
    for option, values in launch.options.items():
        name = option if option in known else option.replace("_", "-")
        if getattr(known.get(name), "nargs", None) == 0 and all("${" in value for value in values):
            why = "a variable with options that the script does not set: give it with --set NAME=VALUE"
            steps += [Step(value, "unknown value", (), why) for value in values]
            values = []
        shown = " ".join([option, *values])
        if any("${" in value for value in values) and not _takes_text(known.get(name)):
            steps.append(Step(shown, "unknown value", (), _how_to_give(values)))
        elif (option, " ".join(values)) in _VALUES:
            words, why = _VALUES[option, " ".join(values)]
            steps.append(Step(shown, "becomes" if words else "left out", tuple(words.split()), why))
        elif option == "--rope-scaling-factor" and "--rope-scaling-type" in launch.options:
            steps.append(Step(shown, "left out", (), "part of --rope-scaling-type"))
        elif option == "--num-layers" and "--noop-layers" in launch.options:
            steps.append(Step(shown, "left out", (), "counts empty layers, see --noop-layers"))
        elif option == "--moe-layer-freq" and "--first-k-dense-replace" in launch.options:
            steps.append(Step(shown, "left out", (), "see --first-k-dense-replace"))
        elif name == "--moe-router-pre-softmax" and launch.options.get(SCORES) == ["sigmoid"]:
            steps.append(Step(shown, "left out", (), "of softmax scores; the script's are sigmoids"))
        elif option == "--spec":
            steps.append(Step(shown, "becomes", ("--spec", "dsv3"), "the layers' specification"))
        elif name in known:
            steps.append(Step(shown, "kept", tuple(_words(name, values, known[name])), ""))
        else:
            steps.append(_foreign(option, values, launch))
    return steps


def _how_to_give(values: Sequence[str]) -> str:
    names = re.findall(r"\$\{(\w+)", " ".join(values))
    numbers = [name for name in names if name.isdigit()]
    if numbers:
        return f"argument {numbers[0]} of the script: give its arguments after its name"
    return f"its value is not in the script: give it with --set {names[0] if names else 'NAME'}=VALUE"


def _takes_text(action: Action | None) -> bool:
    """Whether any text will do, so that a variable can stay in the line."""
    return action is not None and action.type in (None, str) and action.choices is None and action.nargs != 0


def _words(option: str, values: list[str], action: object) -> list[str]:
    """An option with its values; a template's `your data path` is one value where one is wanted."""
    if getattr(action, "nargs", None) == 0:
        return [option]
    if getattr(action, "nargs", None) is None and len(values) > 1:
        values = [" ".join(values)]
    if len(values) == 1 and values[0].startswith("-"):
        return [f"{option}={values[0]}"]
    return [option, *values]


def _foreign(option: str, values: list[str], launch: Launch) -> Step:
    shown = " ".join([option, *values])
    found = foreign_options().get(option) or foreign_options().get(option.replace("_", "-"))
    if found is None:
        return Step(
            shown, "unknown", (), "no option of Megatron 0.19, nor of a fork that is known here: left out"
        )
    if found.rule:
        try:
            words, why = RULES[found.rule](values, launch.options)
        except Blocked as blocked:
            return Step(shown, "impossible", (), f"{found.of}: {blocked}")
        except (ValueError, IndexError):
            return Step(shown, "unknown", (), f"{found.of}: its value is not what it takes")
        return Step(shown, "becomes" if words else "left out", tuple(words), f"{found.of}: {why}")
    if found.becomes:
        words = [word.replace("{}", " ".join(values)) for word in found.becomes.split()]
        return Step(shown, "becomes", tuple(words), found.of)
    return Step(
        shown,
        "left out",
        (),
        f"{found.of}: {found.use.removeprefix('leave it out').lstrip(':;, ') or 'not needed'}",
    )
