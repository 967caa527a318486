"""A file is whole or not there."""

import pytest

from dsv3_megatron.files import whole, write_whole


def test_an_error_leaves_what_was_there(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "first")
    with pytest.raises(KeyboardInterrupt), whole(path) as unfinished:
        unfinished.write_text("half of the sec")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    write_whole(path, "zweite, größer")
    assert path.read_bytes().decode("utf-8") == "zweite, größer"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_too(tmp_path) -> None:
    with whole(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "a").write_text("")
    assert (tmp_path / "folder" / "a").exists()
