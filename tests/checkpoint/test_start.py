"""Which checkpoint a run begins with, and what it records; folders without one are refused."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.arguments import megatron_parser
from dsv3_megatron.checkpoint.recorded import Unreadable, read
from dsv3_megatron.checkpoint.start import start_of
from tests.checkpoint.fake import arguments, write
from tests.checkpoint.test_model import refusal


@pytest.fixture(scope="module")
def parser() -> Any:
    return megatron_parser()


def test_load_comes_before_pretrained(tmp_path: Path) -> None:
    own, base = tmp_path / "own", write(tmp_path / "base", Namespace(train_iters=1), 7)
    args = Namespace(load=str(own), pretrained_checkpoint=str(base))
    start = start_of(args)
    assert start is not None and (start.option, start.goes_on) == ("--pretrained-checkpoint", False)
    write(own, Namespace(train_iters=2), 9)
    start = start_of(args)
    assert start is not None and start.recorded is not None
    assert (start.option, start.goes_on, start.recorded.iteration) == ("--load", True, 9)
    assert start.recorded.args == Namespace(train_iters=2)


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    write(tmp_path, Namespace(train_iters=1), 2)
    write(tmp_path, Namespace(train_iters=1), 4)
    (tmp_path / "iter_0000004" / "metadata.json").unlink()  # the save was cut short, the tracker was written
    start = start_of(Namespace(load=str(tmp_path)))
    assert start is not None and start.recorded is not None and start.recorded.iteration == 2
    # What a killed run put aside is taken back by the run that saves there.
    (tmp_path / "iter_0000002").rename(tmp_path / "iter_0000004.replaced")
    start = start_of(Namespace(load=str(tmp_path), save=str(tmp_path)))
    assert (
        start is not None
        and start.recorded is not None
        and start.recorded.folder.name == "iter_0000004.replaced"
    )


@pytest.mark.parametrize(
    ("step", "problem"), [(2, ""), (3, "--ckpt-step 3: not a complete checkpoint of .*Use one of \\[2\\]")]
)
def test_a_step_is_there_or_refused(step: int, problem: str, parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", arguments(parser), 2)
    text = refusal(arguments(parser, f"--load {saved} --ckpt-step {step}"))
    assert bool(text) == bool(problem)
    if problem:
        import re

        assert re.search(problem, text) and text.startswith(
            f"--load {saved}: no checkpoint there can be loaded"
        )


def test_a_release_has_no_steps(parser: Any, tmp_path: Path) -> None:
    saved = write(tmp_path / "saved", arguments(parser), 0, release=True)
    assert "--ckpt-step 4:" in refusal(arguments(parser, f"--load {saved} --ckpt-step 4"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            "--load nowhere",
            "--load nowhere: the run would begin with random weights (the folder does not exist)",
        ),
        ("--load empty", "the folder holds no checkpoint"),
        (
            "--load empty --save other --save-interval 1",
            "--load empty: the run would begin with random weights",
        ),
        ("--load empty --save empty/ --save-interval 1", ""),
        ("--load nowhere --save nowhere --save-interval 1", ""),
        (
            "--load empty --save empty --save-interval 1 --skip-train",
            "--load empty: the run would begin with random",
        ),
        ("--load nowhere --pretrained-checkpoint saved", "--load nowhere: the run would begin"),
        ("--load empty --save empty --save-interval 1 --pretrained-checkpoint saved", ""),
        (
            "--pretrained-checkpoint nowhere",
            "--pretrained-checkpoint nowhere: there is nothing to begin with",
        ),
        (
            "--load empty --save empty --save-interval 1 --pretrained-checkpoint nowhere",
            "--pretrained-checkpoint nowhere",
        ),
        ("--load saved --exit-on-missing-checkpoint", ""),
        (
            "--load empty --save empty --save-interval 1 --exit-on-missing-checkpoint",
            "--exit-on-missing-checkpoint: there",
        ),
    ],
)
def test_folders(words: str, part: str, parser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "saved", arguments(parser))
    text = refusal(arguments(parser, words))
    assert part in text and bool(part) == bool(text)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for content in ({}, {".metadata": b"cut short"}):
        folder = tmp_path / f"iter_{len(content):07d}"
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
        with pytest.raises(Unreadable, match=str(folder)):
            read(folder)


def test_the_older_format_is_read(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "iter_0000003" / "mp_rank_00_000"
    folder.mkdir(parents=True)
    state = {"args": Namespace(train_iters=3), "iteration": 3, "model": {"w": torch.zeros(4, 4)}}
    torch.save(state, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    start = start_of(Namespace(load=str(tmp_path)))
    assert (
        start is not None and start.recorded is not None and start.recorded.args == Namespace(train_iters=3)
    )


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    saved = write(tmp_path / "saved", Namespace(train_iters=1, evil=Evil()))
    start = start_of(Namespace(load=str(saved)))
    assert start is not None and start.recorded is not None and start.recorded.args is not None
    assert start.recorded.args.train_iters == 1 and not (tmp_path / "ran").exists()
