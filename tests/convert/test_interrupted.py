"""Conversions that are killed, run out of disk or are started twice; progress."""

import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv3_megatron.convert import output
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.progress import Progress
from dsv3_megatron.convert.to_hf import megatron_to_hf
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from tests.convert.releases import release, tensors_of


def killed_at(number: int, convert: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Convert in a process that kills itself at its `number`-th tensor."""
    original, seen = output.PartialOutput.tensor, []

    @contextmanager
    def tensor(self: output.PartialOutput, part: str, name: str) -> Iterator[None]:
        seen.append(name)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        with original(self, part, name):
            yield

    def child() -> None:
        output.PartialOutput.tensor = tensor  # type: ignore[method-assign]
        convert(*args, **kwargs)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def written(folder: Path) -> dict[str, int]:
    """When each finished file of an unfinished output was written."""
    done = [record.stem.replace("+", "/") for record in (folder / "done").glob("*.json")]
    return {name: (folder / "data" / name).stat().st_mtime_ns for name in done}


def test_killed_conversions_go_on_where_they_stopped(tmp_path: Path) -> None:
    expected = release(tmp_path / "hf", mtp=True)
    killed_at(80, hf_to_megatron, tmp_path / "hf", tmp_path / "megatron", workers=1)
    assert not (tmp_path / "megatron").exists()
    before = written(tmp_path / "megatron.partial")
    assert before.keys() == {"release/__0_0.distcp"}
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron.partial").exists()
    assert (tmp_path / "megatron" / "release" / "__0_0.distcp").stat().st_mtime_ns == before[
        "release/__0_0.distcp"
    ]

    killed_at(100, megatron_to_hf, tmp_path / "megatron", tmp_path / "back", shard_size=100_000, workers=1)
    assert not (tmp_path / "back").exists()
    before = written(tmp_path / "back.partial")
    assert len(before) >= 2
    with pytest.raises(ConversionError, match="unfinished conversion of another input or with other options"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="bf16", shard_size=100_000)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", shard_size=100_000)
    assert {name: (tmp_path / "back" / name).stat().st_mtime_ns for name in before} == before
    back = tensors_of(tmp_path / "back")
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_changed_input_is_not_mixed_with_what_was_converted(tmp_path: Path) -> None:
    release(tmp_path / "hf", mtp=True)
    killed_at(80, hf_to_megatron, tmp_path / "hf", tmp_path / "megatron", workers=1)
    (tmp_path / "hf" / "model-00003-of-00003.safetensors").touch()
    with pytest.raises(ConversionError, match=r"megatron.partial: unfinished conversion of another input"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_names_file_and_tensor(workers: int, tmp_path: Path) -> None:
    release(tmp_path / "hf", mtp=True)
    data = tmp_path / "megatron.partial" / "data" / "release"
    data.mkdir(parents=True)
    (data / "__1_0.distcp").symlink_to("/dev/full")
    with pytest.raises(ConversionError, match=r"__1_0.distcp: (model|lm_head)\S+: No space left on device"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", workers=workers)
    assert not (tmp_path / "megatron").exists()
    (data / "__1_0.distcp").unlink()
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")

    data = tmp_path / "back.partial" / "data"
    data.mkdir(parents=True)
    (data / "model-00001-of-00001.safetensors").symlink_to("/dev/full")
    with pytest.raises(ConversionError, match=r"00001.safetensors: model\S+: No space left on device"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", workers=workers)
    assert not (tmp_path / "back").exists()


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = release(tmp_path / "hf")
    needed = sum(tensor.numel() * 4 for tensor in stored.values())
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ConversionError, match=r"--output .*megatron: 0.00 GB are to be written, 0.00 GB are free"
    ):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    usage.free = needed
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")


def test_output_that_exists_or_is_being_written_is_refused(tmp_path: Path) -> None:
    release(tmp_path / "hf")
    running = output.PartialOutput(tmp_path / "megatron", {})
    with pytest.raises(ConversionError, match=r"megatron.partial: another process is writing it"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    del running
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ConversionError, match=r"--output .*there: exists already"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "there")


def test_progress_shows_rate_and_time_left() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Progress("task", 10_000_000_000, stream, clock=lambda: now[0])
    progress.add(1_000_000_000)  # too soon for a line
    now[0] = 4.0
    progress.add(1_000_000_000)
    assert stream.getvalue() == "task 2.0 of 10.0 GB (20%), 0.50 GB/s, 16 s left\n"
    now[0] = 200.0
    progress.add(0)
    assert stream.getvalue().splitlines()[1] == "task 2.0 of 10.0 GB (20%), 0.01 GB/s, 13 min 20 s left"
