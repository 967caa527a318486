"""200 wrong configurations, from the parser and from Hydra's groups: each ends in one line that names an option.

Each has one fault, beside options that are right. None may end in a traceback, a hang or a start.
"""

import contextlib
import functools
import io
import signal
import sys
import warnings
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dsv3_megatron import train, train_hydra
from dsv3_megatron.arguments import megatron_parser
from dsv3_megatron.arguments.command_line import parse_given
from dsv3_megatron.arguments.options import OPTIONS, wrong_numbers
from dsv3_megatron.arguments.settings import BY_DEST
from dsv3_megatron.conf.compose import groups
from tests.arguments.lines import MICRO
from tests.arguments.test_options import words_of
from tests.harness.runtime import forget_the_trainer

COUNT, LIMIT_S = 200, 60
HYDRA = ["model=micro", "layout=cpu_single", "device=cpu", "seq_length=32", "max_position_embeddings=32"]
HYDRA += ["global_batch_size=8", "train_iters=3"]
SCHEDULES = ("dualpipe", "dualpipev", "zb1p")  # one rank has none of them
RIGHT = {"--seed": "5", "--log-interval": "2", "--timing-log-level": "1", "--lr": "2e-3"}


@dataclass(frozen=True)
class Wrong:
    """A configuration with one fault.

    Attributes:
        hydra: in Hydra's words.
        words: after those of the base.
        named: the line has to name one of these.
    """

    hydra: bool
    words: tuple[str, ...]
    named: tuple[str, ...]


@functools.cache
def parser() -> ArgumentParser:
    return megatron_parser()


def actions() -> list[Action]:
    return [a for a in parser()._actions if a.option_strings and "--help" not in a.option_strings]


@functools.cache
def known() -> frozenset[str]:
    return frozenset(option for action in parser()._actions for option in action.option_strings)


def written(hydra: bool, option: str, value: str | None) -> tuple[str, ...]:
    """An option with its value, None for a flag, in the words of either way in."""
    if hydra:
        return (f"{option.removeprefix('--').replace('-', '_')}={'true' if value is None else value}",)
    return (option,) if value is None else (f"{option}={value}",)


def names(hydra: bool, *options: str) -> tuple[str, ...]:
    """How a line may name options."""
    return (*options, *((option.removeprefix("--").replace("-", "_") for option in options) if hydra else ()))


def of(fault: Callable[[Action], list[tuple[str, str | None]]]) -> st.SearchStrategy[Wrong]:
    """An option of the parser that can have this fault, with a value that has it."""
    cases = [(action, value) for action in actions() for value in fault(action)]
    assert len(cases) > 20

    def wrong(case: Any, hydra: bool) -> Wrong:
        action, (option, value) = case
        return Wrong(hydra, written(hydra, option, value), names(hydra, *action.option_strings))

    return st.builds(wrong, st.sampled_from(cases), st.booleans())


def is_single(action: Action) -> bool:
    return action.nargs is None


def unreadable(action: Action) -> list[tuple[str, str | None]]:
    option = action.option_strings[0]
    if not is_single(action) or option in ("--num-layers",):
        return []
    if action.choices is not None:
        return [(option, "nonsense")]
    return [(option, text) for text in ("x", "1e", "3..5")] if action.type in (int, float) else []


def impossible(action: Action) -> list[tuple[str, str | None]]:
    option = action.option_strings[0]
    if not is_single(action) or action.type not in (int, float) or action.choices is not None:
        return []
    values = ["-3", "-1"] if action.type is int else ["-3", "nan", "inf"]
    return [
        (option, v) for v in values if wrong_numbers(Namespace(**{action.dest: action.type(v)}), parser())
    ]


def refused(action: Action) -> list[tuple[str, str | None]]:
    group = OPTIONS.by_name.get(action.dest)
    if group is None or group.fate != "refused" or not group.why or action.nargs not in (None, 0):
        return []
    option, *values = words_of(action)
    return [(option, values[0] if values else None)]


def contradicted(action: Action) -> list[tuple[str, str | None]]:
    setting, option = BY_DEST.get(action.dest), action.option_strings[0]
    if action.dest in ("mtp_num_layers", "q_lora_rank"):  # numbers with a type of their own
        return []
    if setting is None or action.nargs not in (None, 0) or OPTIONS.by_name.get(action.dest) is None:
        return []
    words = words_of(action)
    args = parse_given(parser(), [*MICRO, *words])
    if setting.accepts(getattr(args, action.dest), args):
        return []
    return [(option, words[1] if len(words) > 1 else None)]


@st.composite
def misspelt(draw: st.DrawFn) -> Wrong:
    option = draw(st.sampled_from([o for o in sorted(known()) if o.startswith("--") and len(o) > 8]))
    at = draw(st.integers(3, len(option) - 1))
    text = draw(
        st.sampled_from([option[:at] + option[at + 1 :], option[:at] + "q" + option[at:], option + "s"])
    )
    hydra = draw(st.booleans())
    if text in known() or text.endswith("-") or "--" in text[2:]:
        text = option + "-q"
    return Wrong(hydra, written(hydra, text, "3"), names(hydra, text))


# Faults between options, which each fits by itself: options with values of the micro model, and what may be named.
def related(n: int) -> list[tuple[dict[str, str], tuple[str, ...]]]:
    """n: from 1."""
    return [
        ({"--moe-router-topk": str(8 + n)}, ("--moe-router-topk", "--num-experts")),
        ({"--moe-router-group-topk": str(4 + n)}, ("--moe-router-group-topk", "--moe-router-num-groups")),
        ({"--moe-router-num-groups": str(8 + n)}, ("--moe-router-num-groups",)),
        (
            {"--tensor-model-parallel-size": "2" if n % 2 else "4", "--sequence-parallel": ""},
            ("--tensor-model-parallel-size",),
        ),
        ({"--pipeline-model-parallel-size": "2" if n % 2 else "4"}, ("--pipeline-model-parallel-size",)),
        ({"--context-parallel-size": "2" if n % 2 else "4"}, ("--context-parallel-size",)),
        ({"--expert-model-parallel-size": str(2 ** (1 + n % 3))}, ("--expert-model-parallel-size",)),
        ({"--micro-batch-size": str(8 + n)}, ("--micro-batch-size", "--global-batch-size")),
        ({"--lr-warmup-iters": str(2 + n)}, ("--lr-warmup-iters",)),
        ({"--min-lr": f"{n}.5"}, ("--min-lr",)),
        ({"--train-samples": str(8 * n)}, ("--train-samples",)),
        ({"--save": f"runs/{n}"}, ("--save-interval", "--save")),
        ({"--load": f"nowhere/{n}"}, ("--load",)),
        ({"--pretrained-checkpoint": f"nowhere/{n}"}, ("--pretrained-checkpoint",)),
        ({"--data-path": f"nowhere/{n}"}, ("--data-path",)),
        (
            {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": f"nowhere/{n}"},
            ("--tokenizer-model",),
        ),
        ({"--moe-layer-freq": f"[0]*1+[1]*{3 + n}"}, ("--moe-layer-freq",)),
        ({"--eval-interval": str(n), "--eval-iters": "1", "--full-validation": ""}, ("--full-validation",)),
        ({"--wandb-project": f"p{n}"}, ("--wandb-project",)),
        ({"--pipeline-schedule": SCHEDULES[n % 3]}, ("--pipeline-schedule",)),
        ({"--train-tokens": str(1000 * n)}, ("--train-tokens", "--train-iters")),
    ]


@st.composite
def relations(draw: st.DrawFn) -> Wrong:
    given_, named = draw(st.sampled_from(related(draw(st.integers(1, 7)))))
    words = [word for option, value in given_.items() for word in written(False, option, value or None)]
    return Wrong(False, tuple(words), named)


@st.composite
def of_groups(draw: st.DrawFn) -> Wrong:
    """What only Hydra's words can have."""
    group = draw(st.sampled_from(sorted(groups())))
    n = draw(st.integers(2, 50))
    other = draw(st.sampled_from([layout for layout in groups()["layout"] if layout != "cpu_single"]))
    return draw(
        st.sampled_from(
            [
                Wrong(True, (f"{group}=none{n}",), (group,)),
                Wrong(True, (f"{group}s=x{n}",), (f"{group}s",)),
                Wrong(True, (f"cluster.{group}{n}=3",), (f"cluster.{group}{n}",)),
                Wrong(True, (f"cluster={n}",), ("cluster",)),
                Wrong(True, (f"cluster.nodes={n}",), ("nproc", "nodes")),
                Wrong(True, (f"layout={other}", f"seed={n}"), ("layout", "cluster")),
                Wrong(True, (f"lr={n},{n + 1}",), ("lr",)),
                Wrong(True, (f"train_iters{n}",), (f"train_iters{n}",)),
                Wrong(True, (f"seed='{n}",), ("seed",)),
                Wrong(True, (f"device=tpu{n}",), ("device",)),
                Wrong(True, (f"num_experts=[{n}]",), ("num_experts",)),
                Wrong(True, (f"placement.last_stage_extra={n}",), ("placement.last_stage_extra",)),
                Wrong(True, (f"corpus.dir=x{n}",), ("corpus.dir",)),
                Wrong(True, (f"global_batch_size={n}.5",), ("global_batch_size",)),
            ]
        )
    )


def faults() -> st.SearchStrategy[Wrong]:
    by_option = [of(fault) for fault in (unreadable, impossible, refused, contradicted)]
    return st.one_of(*by_option, misspelt(), relations(), of_groups())


RIGHTS = st.lists(st.sampled_from(sorted(RIGHT.items())), max_size=2, unique=True)


class Started(BaseException):
    """The run has begun."""


def _hangs(*_: Any) -> None:
    raise TimeoutError(f"nothing for {LIMIT_S} s")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(
    wrong: Wrong, right: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[str]]:
    """Exit status, and what it says on standard error."""
    own = {word.split("=")[0] for word in wrong.words}
    more = [word for pair in right if pair[0] not in own for word in written(wrong.hydra, *pair)]
    said = io.StringIO()
    with monkeypatch.context() as patched, bounded(), contextlib.redirect_stderr(said):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patched.setenv("WORLD_SIZE", "1")
            words = [*MICRO, *more, *wrong.words]
            patched.setattr(sys, "argv", ["train.py", "--spec", "dsv3", "--device", "cpu", *words])
            try:
                train_hydra.main([*HYDRA, *more, *wrong.words]) if wrong.hydra else train.command()
                status: Any = "ended"
            except SystemExit as left:
                status = left.code
            except Started:
                status = "started"
            finally:
                forget_the_trainer()
    return status, [line for line in said.getvalue().splitlines() if line.strip()]


@pytest.mark.slow
def test_wrong_configurations_end_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.training

    def pretrain(*args: Any, **kwargs: Any) -> None:
        raise Started

    monkeypatch.setattr(megatron.training, "pretrain", pretrain)
    seen: dict[Wrong, str] = {}
    bad: list[tuple[Wrong, Any, list[str]]] = []

    @seed(13)
    @settings(max_examples=3 * COUNT, database=None, suppress_health_check=list(HealthCheck))
    @given(faults(), RIGHTS)
    def examine(wrong: Wrong, right: list[tuple[str, str]]) -> None:
        if wrong in seen or len(seen) == COUNT:
            return
        status, lines = outcome(wrong, right, monkeypatch)
        seen[wrong] = lines[0] if lines else ""
        named = len(lines) == 1 and any(name in lines[0] for name in wrong.named)
        if status != 2 or not named or not lines[0].startswith("error: "):
            bad.append((wrong, status, lines[:4]))

    examine()
    hydra = sum(wrong.hydra for wrong in seen)
    print(f"{len(seen)} wrong configurations, {hydra} of them in Hydra's words; {len(bad)} not told")
    assert not bad, "\n".join(f"{w.words} -> {status}: {lines}" for w, status, lines in bad)
    assert len(seen) == COUNT


def test_a_right_configuration_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without a fault, both ways in reach the start, and the harness says so."""
    import megatron.training

    def pretrain(*args: Any, **kwargs: Any) -> None:
        raise Started

    monkeypatch.setattr(megatron.training, "pretrain", pretrain)
    # A sequence may have any length where nothing cuts it: --max-position-embeddings follows it unless given, and what
    # cuts it (tensor and context parallelism) refuses by itself.
    for hydra, words in ((False, ()), (False, ("--seq-length=4101",)), (True, ())):
        status, lines = outcome(Wrong(hydra, words, ()), [("--seed", "5")], monkeypatch)
        assert status == "started" and lines == [], (words, lines)
