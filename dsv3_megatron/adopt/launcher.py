"""What stands before a trainer in a command: how many processes torchrun or Slurm start, and the environment."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

__all__ = ["OF_STEP", "TORCHRUN", "allocation", "environment", "size", "without_shell"]

TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
SLURM = ("srun", "sbatch", "salloc")

# Options by what they count, each with a value.
_OF_TORCHRUN = {
    "nodes": ("--nnodes", "--num-nodes", "--num_nodes"),
    "per node": ("--nproc-per-node", "--nproc_per_node"),
}
_OF_SLURM = {
    "nodes": ("-N", "--nodes"),
    "tasks": ("-n", "--ntasks"),
    "tasks per node": ("--ntasks-per-node", "--tasks-per-node"),
    "gpus per node": ("--gpus-per-node", "--gres"),
    "gpus": ("-G", "--gpus"),
}
# What may stand for a number: one per device, a range, a variable that is not known.
_NOT_KNOWN = re.compile(r"gpu|cpu|auto|xpu|\d+[:-]\d+|.*\$.*")
_GPUS = re.compile(r"(?:gpu:)?(?:[A-Za-z][\w.-]*:)?(\d+)(?:\(.*\))?")  # 8, h100:8, gpu:8, gpu:h100:8
# Variables of the environment that may change how long a step takes.
OF_STEP = re.compile(
    r"NVTE_\w+|CUDA_LAUNCH_BLOCKING|NCCL_(ALGO|PROTO|\w+_DISABLE|NVLS_ENABLE|\w+_NCHANNELS|\w+_CTAS|NTHREADS|BUFFSIZE)"
)
_VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


def size(
    words: Sequence[str], slurm: Sequence[str] = (), per_node: int | None = None
) -> tuple[int | None, int | None]:
    """Nodes and ranks of a node; None where that cannot be told.

    Args:
        words: those before the trainer.
        slurm: options of the allocation, for what the words do not say.
        per_node: ranks of a node as somebody else says, for a number of all tasks without nodes.

    Raises:
        ValueError: a number of nodes or ranks is none.
    """
    names = [word.rpartition("/")[2] for word in words]
    at = next((i for i, name in enumerate(names) if name in TORCHRUN), None)
    of_srun = next((i + 1 for i, name in enumerate(names) if name in SLURM), len(words))
    said = {**_counts(slurm, _OF_SLURM), **_counts(words[of_srun:at], _OF_SLURM)}
    nodes, gpus = said.get("nodes"), said.get("gpus per node")
    if at is not None:  # it starts the ranks, whatever number of tasks starts it
        ours, given = _counts(words[at + 1 :], _OF_TORCHRUN), set(_options(words[at + 1 :]))
        wants_nodes = bool(given & set(_OF_TORCHRUN["nodes"]))
        return ours.get("nodes", nodes if wants_nodes else None), ours.get("per node", gpus)
    tasks, ranks = said.get("tasks"), said.get("tasks per node")
    if tasks and nodes:  # the number on a node is then the most it may be
        ranks = tasks // nodes if tasks % nodes == 0 else None
    ranks, every = ranks or gpus, tasks or said.get("gpus")
    if every is None:
        return nodes, ranks
    of_node = ranks or (every // nodes if nodes else per_node or 8)
    of_node = min(of_node, every)
    if every % of_node == 0 and (nodes or every // of_node) * of_node == every:
        return every // of_node, of_node
    if nodes or ranks:
        raise ValueError(f"{every} tasks: cannot lie evenly on nodes; use a number that nodes divide")
    return None, None  # the nodes are of another size than most


def _counts(words: Iterable[str], names: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Numbers by what they count; the first option counts, a later one may be another program's."""
    options = _options(words)
    found = {}
    for what, spellings in names.items():
        numbers = [_number(name, options[name]) for name in spellings if name in options]
        if known := [number for number in numbers if number is not None]:
            found[what] = known[0]
    return found


def _options(words: Iterable[str]) -> dict[str, str]:
    """Values by option: `--name VALUE`, `--name=VALUE`, `-N VALUE`, `-N2`; "" without a value."""
    options: dict[str, str] = {}
    for word, following in pairwise([*words, ""]):
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            options.setdefault(name, value if sign else following)
        elif re.fullmatch(r"-[NnG]\d*", word):
            options.setdefault(word[:2], word[2:] or following)
    return options


def _number(name: str, value: str) -> int | None:
    value = value.strip("'\"")
    if name == "--gres":  # other devices stand beside GPUs
        value = next((part for part in value.split(",") if part.startswith("gpu")), "gpu")
    gpus = _GPUS.fullmatch(value) if name in ("--gres", "--gpus-per-node", "--gpus", "-G") else None
    value = gpus[1] if gpus else value
    if value.isdecimal() and int(value) > 0:
        return int(value)
    if value and not _NOT_KNOWN.fullmatch(value):
        raise ValueError(f"{name} {value}: is no whole number; use one, or leave {name} out")
    return None


def allocation(text: str) -> list[str]:
    """Options of a script's `#SBATCH` lines, which end where its commands begin."""
    words: list[str] = []
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            words += line.removeprefix("#SBATCH").partition(" #")[0].split()
        elif line.strip() and not line.startswith("#"):
            break
    return words


def environment(words: Iterable[str]) -> dict[str, str]:
    """Variables that the words before a trainer set: `NAME=VALUE`, `env NAME=VALUE`, `srun --export=ALL,NAME=VALUE`."""
    found: dict[str, str] = {}
    for word in words:
        for part in word.removeprefix("--export=").split(",") if word.startswith("--export=") else [word]:
            if match := _VARIABLE.fullmatch(part):
                found[match[1]] = match[2]
    return found


_REDIRECTION = re.compile(r"(\d|&)?(>>?&?[^&>].*|<[^<>]+)")  # with its file; <eos> is none
_BEFORE_FILE = re.compile(r"(\d|&)?(>>|>|<)")


def without_shell(words: Sequence[str]) -> list[str]:
    """Without what a shell does with a command's output at its end: a redirection, a pipe, a `&`."""
    kept = list(words)
    pipe = next((i for i, word in enumerate(kept) if word in ("|", "|&")), None)
    if pipe is not None and not {"&&", "||", ";", "python", "python3", *TORCHRUN}.intersection(kept[pipe:]):
        kept = kept[:pipe]
    while kept:
        last = kept[-1]
        if last in ("&", ";"):
            kept.pop()
        elif last.endswith(("&", ";")) and not last.endswith((">&", "&&", ";;")):
            kept[-1] = last[:-1]
        elif _REDIRECTION.fullmatch(last):
            kept.pop()
        elif len(kept) > 1 and _BEFORE_FILE.fullmatch(kept[-2]):
            del kept[-2:]
        else:
            break
    return kept
