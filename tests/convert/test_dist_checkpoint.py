"""Reading `torch_dist` checkpoints: pieces in mapped files, as torch's own writer leaves them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dsv3_megatron.convert.dist_checkpoint import DistCheckpoint
from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.inventory import Slot


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Pieces follow each other in the file wherever the one before ended; one is transposed."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "transposed": torch.randn(5, 3, generator=generator).T,
        "half": torch.randn(7, generator=generator).bfloat16(),
        "double": torch.randn(4, 4, generator=generator, dtype=torch.float64),
        "byte": torch.arange(3, dtype=torch.uint8),
        "single": torch.randn(2, 2, generator=generator),
    }
    folder = tmp_path_factory.mktemp("saved")
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder, tensors


def whole(name: str, tensor: Tensor) -> Slot:
    return Slot(name, tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape))


def test_pieces_are_read_as_they_were_saved(saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = saved
    checkpoint = DistCheckpoint(folder)
    offsets = {info.offset % 8 for info in checkpoint._storage.values()}
    assert len(offsets) > 1  # some lie where their dtype cannot be used in place
    for name, tensor in tensors.items():
        got = checkpoint.read(whole(name, tensor))
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)


def test_versions_of_torch_that_do_not_tell_where_data_lies(
    saved: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tensors = saved
    load = torch.load

    def load_without_offsets(file: Any, map_location: str, **options: Any) -> Any:
        value = load(file, map_location=map_location, **options)
        return torch.empty_like(value) if map_location == "meta" else value

    monkeypatch.setattr(torch, "load", load_without_offsets)
    checkpoint = DistCheckpoint(folder)
    for name in ("transposed", "double"):
        assert torch.equal(checkpoint.read(whole(name, tensors[name])), tensors[name])


def test_a_damaged_piece_is_named(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, tensors = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = DistCheckpoint(tmp_path)
    info = next(info for index, info in checkpoint._storage.items() if index.fqn == "double")
    with (tmp_path / info.relative_path).open("r+b") as file:
        file.seek(info.offset)
        file.write(bytes(info.length))
    with pytest.raises(ConversionError, match=f"{info.relative_path}: double at byte {info.offset}"):
        DistCheckpoint(tmp_path).read(whole("double", tensors["double"]))
