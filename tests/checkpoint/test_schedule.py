"""The learning-rate schedule of a checkpoint: differences are refused before the start, unless an option says which."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3_megatron.arguments import megatron_parser
from dsv3_megatron.checkpoint.schedule import planned
from tests.checkpoint.fake import arguments, write
from tests.checkpoint.test_model import refusal


@pytest.fixture(scope="module")
def parser() -> Any:
    return megatron_parser()


TOKENS = "--train-tokens 100000 --global-batch-size 8"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--lr-warmup-iters 1",
        "--lr-warmup-fraction 0.1 --lr-decay-style cosine",
        "--lr-decay-iters 2 --weight-decay-incr-style linear --start-weight-decay 0.05 --end-weight-decay 0.1",
        "--lr-decay-style WSD --lr-wsd-decay-iters 1 --lr-warmup-init 1e-5",
        TOKENS,
    ],
)
def test_planned_is_what_megatron_builds(words: str, parser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import training

    from dsv3_megatron.recipe.scheduler import FivePhaseScheduler
    from dsv3_megatron.recipe.schedules import LAST_PHASE

    args = arguments_of(parser, words)
    if args.weight_decay_incr_style == "constant":
        args.start_weight_decay = args.end_weight_decay = args.weight_decay
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr(training, "update_train_iters", lambda args: None)
    scheduler = (
        training.get_optimizer_param_scheduler.__wrapped__
        if hasattr(training.get_optimizer_param_scheduler, "__wrapped__")
        else training.get_optimizer_param_scheduler
    )
    built = scheduler(SimpleNamespace(param_groups=[]))
    now = planned(args)
    assert now is not None
    if args.train_tokens is not None:
        built = FivePhaseScheduler.extend(built, now["last_phase"], now["last_lr"])
        from dsv3_megatron.recipe.arguments import schedules_of

        schedules = schedules_of(args)
        assert schedules is not None and now["last_phase"] == schedules.samples(LAST_PHASE)
    assert {name: getattr(built, name) for name in now} == now
    assert {k: v for k, v in built.state_dict().items() if k != "num_steps"}.items() <= now.items()


def arguments_of(parser: Any, words: str) -> Any:
    """The micro model's; without its own length where the words bring one."""
    if "--train-tokens" not in words:
        return arguments(parser, words)
    from tests.arguments.lines import MICRO

    line = list(MICRO)
    at = line.index("--train-iters")
    return arguments(parser, words, line[:at] + line[at + 2 :])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--lr 5e-4", "--lr 0.001 (this run: 0.0005)"),
        (
            "--train-iters 6",
            "--train-iters / --train-samples / --train-tokens 24 samples (this run: 48 samples)",
        ),
        ("--lr-warmup-iters 1", "--lr-warmup-fraction 0 samples (this run: 8 samples)"),
        ("--lr-decay-style cosine", "--lr-decay-style linear (this run: cosine)"),
        ("--lr 5e-4 --override-opt-param-scheduler", ""),
        ("--lr 5e-4 --use-checkpoint-opt-param-scheduler", ""),
        ("--lr 5e-4 --finetune", ""),
        ("--lr 5e-4 --no-load-optim", ""),
        ("--lr 5e-4 --skip-train", ""),
        (
            "--use-checkpoint-opt-param-scheduler --finetune",
            "--use-checkpoint-opt-param-scheduler: the run does not go on",
        ),
        ("--use-checkpoint-opt-param-scheduler --override-opt-param-scheduler", "says the opposite"),
    ],
)
def test_another_schedule(words: str, part: str, parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", arguments(parser))
    text = refusal(arguments(parser, f"--load {saved} {words}"))
    assert part in text and bool(part) == bool(text)


def test_more_tokens(parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", arguments_of(parser, TOKENS))
    more = f"--train-tokens 200000 --global-batch-size 8 --load {saved}"
    text = refusal(arguments_of(parser, more))
    assert text.startswith(
        f"--load {saved} (iter_0000004): the checkpoint's learning-rate schedule is another one"
    )
    assert "--override-opt-param-scheduler" in text
    assert refusal(arguments_of(parser, f"{more} --override-opt-param-scheduler")) == ""


def test_a_fifth_phase_is_not_lost(parser: Any, tmp_path: Path) -> None:
    """Kept constants of `--train-tokens` need our scheduler, which that option brings."""
    saved = write(tmp_path / "saved", arguments_of(parser, TOKENS))
    words = f"--load {saved} --use-checkpoint-opt-param-scheduler"
    assert "--train-tokens" in refusal(arguments(parser, words))


def test_a_checkpoint_without_optimizer_has_no_schedule(parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", arguments(parser), opt_param_scheduler=None)
    assert refusal(arguments(parser, f"--load {saved} --lr 5e-4 --no-load-optim")) == ""
    words = f"--load {saved} --use-checkpoint-opt-param-scheduler --no-load-optim"
    assert "--use-checkpoint-opt-param-scheduler: the run does not go on" in refusal(arguments(parser, words))
