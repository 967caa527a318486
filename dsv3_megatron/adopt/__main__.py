"""`dsv3 adopt SCRIPT.sh`: what a launch script of Megatron-LM, or of a fork, becomes under `--spec dsv3`.

Prints what becomes of each option and why, what is filled in, and the line; the line has passed every check that a run
begins with. Exit status 0 when it is the script's model, 1 when something stands in the way (it says what).
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsv3_megatron.adopt import shell, zoo
from dsv3_megatron.adopt.expand import Expander
from dsv3_megatron.adopt.line import Adopted, adopt
from dsv3_megatron.adopt.translate import HYDRA, Launch, Step, launch_of
from dsv3_megatron.arguments.surroundings import MAX_CONNECTIONS
from dsv3_megatron.errors import RefusedArgument, exits_cleanly

WIDTH = 46  # of the first column
ASK = "give it $1, $2, … after the name, and variables of its environment with --set NAME=VALUE"
NAMES = r"\$\{([A-Za-z_]\w*)"  # of what a script does not say


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsv3 adopt", description=__doc__)
    parser.add_argument("script", help="a shell script, or a YAML file of Megatron-MoE-ModelZoo")
    parser.add_argument("arguments", nargs="*", help="$1, $2, … of the script")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="variables that the script takes from its environment",
    )
    parser.add_argument("--ranks", type=int, help="of the job, where the script does not say")
    parser.add_argument("--ranks-per-node", type=int, help="8, where the script does not say")
    return parser


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    path = Path(options.script)
    launches, notes = launches_of(path, options.arguments, _variables(options.set))
    from dsv3_megatron.dryrun.start import start_megatron

    start_megatron()
    from dsv3_megatron.arguments.command_line import megatron_parser

    good = True
    for where, launch in launches:
        if launch.program == HYDRA:
            raise RefusedArgument(
                f"{where}: starts {HYDRA}, which is this project's already; use it as it is"
            )
        launch = _with_ranks(launch, options.ranks, options.ranks_per_node)
        adopted = adopt(launch, megatron_parser())
        print("\n".join(report(where, launch, adopted, notes)))
        good = good and not adopted.problems
    sys.exit(0 if good else 1)


def _variables(texts: Sequence[str]) -> dict[str, str]:
    wrong = [text for text in texts if not re.match(r"[A-Za-z_]\w*=", text)]
    if wrong:
        raise RefusedArgument(f"--set {wrong[0]}: write NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def launches_of(
    path: Path, arguments: Sequence[str], given: dict[str, str]
) -> tuple[list[tuple[str, Launch]], list[str]]:
    """Every start of a trainer, with where it stands; and what could not be decided on the way."""
    if not path.is_file():
        raise RefusedArgument(f"{path}: there is no such file")
    is_model_file = path.suffix in (".yaml", ".yml")
    try:
        if is_model_file:
            expander = Expander(dict(given), path, list(arguments))
            table = {name: expander.expand_text(value) for name, value in zoo.model_arguments(path).items()}
            launch, names = launch_of(["pretrain_gpt.py", *zoo.words(table)]), shell.names(path.read_text())
        else:
            script = shell.read(path, arguments, given)
            names = script.names
    except (ValueError, OSError) as error:
        raise RefusedArgument(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    for name in given:
        if name not in names:
            raise RefusedArgument(f"{path}: has no variable {name}; leave {name}={given[name]} out")
    if is_model_file:
        return ([(str(path), launch)] if launch is not None else []), []
    _refuse_idle(path, arguments, given, script)
    launches = []
    for c in script.commands:
        where = f"{path if c.file == path.resolve() else c.file}:{c.line}"
        try:
            launches.append((where, launch_of(c.words, script.slurm, c.env)))
        except ValueError as error:
            raise RefusedArgument(f"{where}: {error}") from error
    found = {str(launch): (where, launch) for where, launch in launches if launch is not None}
    if not found:
        raise RefusedArgument(f"{path}: {_no_trainer(script)}")
    return list(found.values()), script.notes


def _no_trainer(script: shell.Script) -> str:
    """Why no trainer was found, and what to give."""
    missing = [word for word, read in script.started.items() if not read]
    if missing:
        return f"starts another script, {missing[0]}, which is not beside it; give that one, or put it there"
    also = [word for word, read in script.started.items() if read]
    where = f"in it or in {', '.join(also)} starts" if also else "in it starts"
    unknown = script.notes or any("${" in word for c in script.commands for word in c.words)
    how = ASK if unknown else "give the script that starts pretrain_gpt.py or -m dsv3_megatron.train"
    return f"no command {where} a Python program with a trainer's options; {how}"


def _refuse_idle(path: Path, arguments: Sequence[str], given: dict[str, str], script: shell.Script) -> None:
    """Variables that would change nothing: the script sets them whatever they were."""
    for name, value in given.items():
        if script.variables.get(name) == value:
            continue
        without = shell.read(path, arguments, {other: given[other] for other in given if other != name})
        if without.commands == script.commands:
            raise RefusedArgument(
                f"{path}: sets {name} itself, so that {name}={value} changes nothing; change it there, or leave it out"
            )


def _with_ranks(launch: Launch, ranks: int | None, per_node: int | None) -> Launch:
    per_node = per_node or launch.ranks_per_node
    if ranks is None:
        return replace(launch, ranks_per_node=per_node)
    per_node = min(per_node or 8, ranks)
    if ranks % per_node:
        raise RefusedArgument(f"--ranks {ranks}: is not divisible by --ranks-per-node {per_node}")
    return replace(launch, nodes=ranks // per_node, ranks_per_node=per_node)


def report(where: str, launch: Launch, adopted: Adopted, notes: Sequence[str]) -> list[str]:
    """The page for one launch."""
    lines = [f"{where}: {launch.program}, {len(launch.options)} options", ""]
    lines += [_line(step) for step in adopted.steps]
    if adopted.filled:
        lines += ["", "Filled in by --spec dsv3, where the script leaves Megatron's default:"]
        lines += [
            f"  {words:<{WIDTH}} (Megatron: {default})  {source}" for words, default, source in adopted.filled
        ]
    lines += [f"note: {note}" for note in notes]
    if launch.stray:
        lines.append(f"note: words that belong to no option: {' '.join(launch.stray)}")
    names = sorted(set(re.findall(NAMES, " ".join(adopted.words))))
    if names:
        lines.append(f"note: not in the script, and left for the shell: {', '.join(names)}")
    ranks = f"{adopted.around.world_size} ranks, {adopted.around.ranks_per_node} a node"
    ranks += " (the script does not say: --ranks N)" if adopted.assumed else ""
    lines += ["", f"Checked as a run on {ranks}, without looking at files:"]
    if adopted.problems:
        lines += [f"  problem: {problem}" for problem in adopted.problems]
    else:
        lines += ["  the script's model, and nothing in it is refused"]
    return [*lines, "", command(adopted), ""]


def _line(step: Step) -> str:
    words = shell_words(step.words)
    if step.kind == "added":
        return f"  {'':<{WIDTH}} added: {words}  ({step.why})"
    result = {"kept": "kept", "becomes": f"becomes {words}", "unknown": "left out"}.get(step.kind, step.kind)
    return f"  {step.option:<{WIDTH}} {result}" + (f"  ({step.why})" if step.why else "")


def command(adopted: Adopted) -> str:
    """The line for the shell, an option a line."""
    around = adopted.around
    nodes = around.world_size // around.ranks_per_node
    launch = [f"{MAX_CONNECTIONS}={around.max_connections}"]
    launch += ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(around.ranks_per_node)]
    if nodes > 1:
        launch += [
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "dsv3",
            "--rdzv-endpoint",
            "$MASTER_ADDR:$MASTER_PORT",
        ]
    groups: list[list[str]] = []
    for word in adopted.words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    lines = [" ".join([*map(_quoted, launch), "-m", "dsv3_megatron.train"]), *map(shell_words, groups)]
    return " \\\n    ".join(lines)


def shell_words(words: Sequence[str]) -> str:
    """Words as a shell reads them; `${NAME}` stays a variable."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    return f'"{word}"' if "$" in word else shlex.quote(word)


if __name__ == "__main__":
    main()
