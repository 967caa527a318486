"""Tasks by name: those of this package (`tasks/`), of a folder of the user's, and the harness's own.

The harness reads fourteen thousand files to know its own. Here the names alone are looked for first, as text; then the
harness reads the folders that hold them, or all where these refer to others.
"""

import difflib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument

__all__ = ["OURS", "check_names", "load_tasks", "our_tasks", "split_names"]

OURS = Path(__file__).parent / "tasks"
# Inside a group too, where others are defined or referred to.
_NAME = re.compile(r"^[ \t-]*[\"']?(?:task|group|tag)[\"']?: *[\"']?([^\s\"'\[#]+)", re.MULTILINE)
_MISSING = re.compile(r"^Unable to find '([^']+)'")
_TAGS = re.compile(r"^tag:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)", re.MULTILINE)
# Of a KeyError: the harness looks up how to aggregate a metric that it does not know.
_UNKNOWN_METRIC = (None,)


def split_names(words: Sequence[str]) -> list[str]:
    """Names from the words of an option, which may be divided by commas too; each once, in their order."""
    return list(dict.fromkeys(name for word in words for name in word.split(",") if name))


def our_tasks() -> list[str]:
    """Names of the tasks that come with this package."""
    return sorted({name for name, _ in _names_in(OURS)})


def check_names(names: Sequence[str], include: Path | None = None, option: str = "--tasks") -> None:
    """Whether there are tasks of these names; without reading them.

    Raises:
        RefusedArgument: the harness is not installed, or a name is unknown; the nearest is named.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RefusedArgument(f"{option}: needs lm-evaluation-harness: pip install 'dsv3_megatron[eval]'")
    if not names:
        raise RefusedArgument(f"{option}: names no task; ours are {', '.join(our_tasks())}")
    if include is not None and not include.is_dir():
        raise RefusedArgument(f"--include-path {include}: no such folder")
    for name in names:
        if not _folders_of(name, include):
            raise RefusedArgument(f"{option} {name}: no such task; {_hint(name, include)}")


@cache
def _hint(name: str, include: Path | None) -> str:
    everything = sorted({known for root in _roots(include) for known, _ in _names_in(root)})
    close = difflib.get_close_matches(name, everything, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"ours are {', '.join(our_tasks())}"


def load_tasks(
    names: Sequence[str], include: Path | None = None, option: str = "--tasks", download: bool = False
) -> Any:
    """The tasks with their data, as the harness's `TaskManager.load` gives them.

    Args:
        download: whether data that is not on this machine may be fetched.

    Raises:
        RefusedArgument: see `check_names`; or a task's data is not here.
    """
    check_names(names, include, option)
    _silence()
    with _network(download):
        manager = _manager(names, include)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            for kind, found in _load(manager, name, include, option).items():
                loaded[kind] |= found
    return loaded


def _load(manager: Any, name: str, include: Path | None, option: str) -> dict[str, Any]:
    try:
        try:
            return manager.load([name])
        except KeyError as error:  # refers to a task in another folder
            if error.args == _UNKNOWN_METRIC:
                raise
            from lm_eval.tasks import TaskManager

            return TaskManager(include_path=_extra(include)).load([name])
    except RefusedArgument:
        raise
    except Exception as error:
        from_data = type(error).__module__.split(".")[0] in (
            "datasets",
            "huggingface_hub",
            "requests",
            "httpx",
        )
        if missing := _MISSING.search(str(error)):  # of a task that names files of its own
            raise RefusedArgument(f"{option} {name}: {missing[1]}: no such file") from error
        if from_data or isinstance(error, OSError):
            named = re.search(r"'([\w.-]+/[\w.-]+)'", str(error))
            where = f" ({named[1]})" if named else _data_of(manager, name)
            raise RefusedArgument(
                f"{option} {name}: its data{where} is not on this machine; load it once where there is a network "
                "(--download), or set HF_HOME to where it is"
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if error.args == _UNKNOWN_METRIC:
            reason = "a metric of its metric_list is none of the harness's"
        raise RefusedArgument(f"{option} {name}: cannot be loaded ({reason})") from error


def _data_of(manager: Any, name: str) -> str:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        path = load_yaml(manager.task_index[name].yaml_path, resolve_func=False).get("dataset_path")
    except Exception:
        return ""
    return f" ({path})" if path else ""


def _manager(names: Sequence[str], include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    folders = dict.fromkeys(folder for name in names for folder in _folders_of(name, include))
    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


def _extra(include: Path | None) -> list[str]:
    return [str(OURS)] + ([str(include)] if include is not None else [])


def _roots(include: Path | None) -> list[Path]:
    """Where tasks are defined; what comes first counts."""
    import lm_eval

    harness = Path(lm_eval.__file__).parent / "tasks"
    return [*([include] if include is not None else []), OURS, harness]


def _folders_of(name: str, include: Path | None) -> list[Path]:
    """Folders that define a task, a group or a tag of this name, of the first root that has one.

    Of the harness's own the uppermost below its root, which holds what belongs together.
    """
    for root in _roots(include):
        files = [file for known, file in _names_in(root) if known == name]
        if files and root in (include, OURS):
            return [root]
        if files:
            return list(dict.fromkeys(root / file.relative_to(root).parts[0] for file in files))
    return []


@cache
def _names_in(root: Path) -> tuple[tuple[str, Path], ...]:
    return tuple(_read_names(root))


def _read_names(root: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(root.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        for name in _NAME.findall(text):
            yield name, file
        for block in _TAGS.findall(text):
            for line in block.splitlines():
                yield line.strip().lstrip("-").strip().strip("\"'"), file


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Without `allowed` nothing is fetched: what is not here is missing at once, on every machine alike."""
    import datasets
    import huggingface_hub

    switches = ((datasets.config, "HF_DATASETS_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"),
                (huggingface_hub.constants, "HF_HUB_OFFLINE"))  # fmt: skip
    before = [getattr(module, name, None) for module, name in switches]
    if not allowed:
        for module, name in switches:
            setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def _silence() -> None:
    """From now on without the harness's remarks on tasks, and the bars of its data."""
    import datasets

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
