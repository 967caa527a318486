"""Which checkpoint is picked up: real torch_dist folders, broken in the ways a killed save breaks them."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dsv3_megatron.resilience import checkpoints as ck


def write(root: Path, iteration: int, value: float = 0.0, finished_at: int | None = None) -> Path:
    """A complete checkpoint, as Megatron leaves it, that ends at a given time."""
    folder = ck.folder_of(root, iteration)
    state = {"weight": torch.full((256,), value), "bias": torch.arange(8.0)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / ck.MARK).write_text('{"sharded_backend": "torch_dist"}')
    if finished_at is not None:
        os.utime(folder / ck.MARK, (finished_at, finished_at))
    return folder


def track(root: Path, text: str) -> None:
    (root / ck.TRACKER).write_text(text)


def value_in(folder: Path) -> float:
    state = {"weight": torch.empty(256)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return float(state["weight"][0])


def no_mark(folder: Path) -> None:
    (folder / ck.MARK).unlink()


def no_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def cut_metadata(folder: Path) -> None:
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data[: len(data) // 2])


def no_data(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def cut_data(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)


def cut_mark(folder: Path) -> None:
    (folder / ck.MARK).write_text('{"sharded_ba')


@pytest.mark.parametrize("damage", [no_mark, no_metadata, cut_metadata, no_data, cut_data, cut_mark])
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path: Path) -> None:
    write(tmp_path, 2, finished_at=100)
    newest = write(tmp_path, 4, finished_at=200)
    track(tmp_path, "4")
    assert ck.iteration_to_load(tmp_path) == 4
    damage(newest)
    assert not ck.is_complete(newest)
    assert ck.iteration_to_load(tmp_path) == 2


@pytest.mark.parametrize("text", ["", "4"])
def test_without_a_useful_tracker_the_last_one_saved_counts(text: str, tmp_path: Path) -> None:
    """Not the highest number: a run that went back to 2 has saved 3 after it left 9 behind."""
    write(tmp_path, 9, finished_at=100)
    write(tmp_path, 2, finished_at=90)
    write(tmp_path, 3, finished_at=200)
    track(tmp_path, text)
    assert ck.iteration_to_load(tmp_path) == 3


def test_nothing_complete_is_an_error(tmp_path: Path) -> None:
    no_mark(write(tmp_path, 2))
    track(tmp_path, "")
    with pytest.raises(ck.NoCompleteCheckpoint, match=r"--load .*no checkpoint there is complete"):
        ck.iteration_to_load(tmp_path)


def test_a_checkpoint_written_anew_is_there_whole_at_any_time(tmp_path: Path) -> None:
    write(tmp_path, 4, value=1.0)
    track(tmp_path, "4")
    ck.begin(tmp_path, 4)
    assert not ck.folder_of(tmp_path, 4).exists()
    ck.recover(tmp_path)  # killed at once
    assert ck.iteration_to_load(tmp_path) == 4 and value_in(ck.folder_of(tmp_path, 4)) == 1.0
    ck.begin(tmp_path, 4)
    no_mark(write(tmp_path, 4, value=2.0))  # killed before the end
    ck.recover(tmp_path)
    assert ck.iteration_to_load(tmp_path) == 4 and value_in(ck.folder_of(tmp_path, 4)) == 1.0
    ck.begin(tmp_path, 4)
    write(tmp_path, 4, value=3.0)
    ck.recover(tmp_path)
    assert ck.iteration_to_load(tmp_path) == 4 and value_in(ck.folder_of(tmp_path, 4)) == 3.0
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000004"]


def test_what_an_interrupted_save_left_is_not_mixed_into_the_next(tmp_path: Path) -> None:
    stale = ck.folder_of(tmp_path, 4) / "__7_0.distcp"
    stale.parent.mkdir()
    stale.write_bytes(b"of another layout")
    ck.begin(tmp_path, 4)
    assert not stale.exists()
