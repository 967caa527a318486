"""Reports: the word, and what must not be in them."""

import json
import math
import socket

import pytest

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.prove.report import Check, Report, new_folder, scrubbed


@pytest.mark.parametrize(
    "held, word",
    [
        ([True, True], "proved"),
        ([True, False, None], "refuted"),
        ([True, None], "incomplete"),
        ([], "incomplete"),
    ],
)
def test_the_word(held, word):
    report = Report("layout", "…", [Check("a", "b", "c", one) for one in held])
    assert report.word == word


def test_nothing_private_is_written(tmp_path):
    host = socket.gethostname()
    secret = f"file {tmp_path}/x.bin of /home/somebody/models/v3 on {host}, 3/4 of it, loss 1/2"
    report = Report(
        "commit", secret, [Check("c", secret, "how", False, 1, math.inf, secret)], [secret], {secret: secret}
    )
    report.tables["table"] = [{"name": secret}]
    report.write(tmp_path / "report", {str(tmp_path): "<hf>"})
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        "report.json",
        "report.md",
        "table.json",
    }
    for file in (tmp_path / "report").iterdir():
        text = file.read_text()
        assert str(tmp_path) not in text and "somebody" not in text and "models/v3" not in text
        assert len(host) <= 3 or host not in text
        assert "3/4 of it" in text or file.name == "report.md"
    assert json.loads((tmp_path / "report" / "report.json").read_text())["checks"][0]["worst"] == "inf"
    assert scrubbed("3/4 and a/b, http://x.org/y/z", {}) == "3/4 and a/b, http://x.org/y/z"


def test_a_folder_that_is_there_is_refused(tmp_path):
    (tmp_path / "report").mkdir()
    new_folder(tmp_path / "report")
    (tmp_path / "report" / "x").write_text("")
    with pytest.raises(RefusedArgument, match="is there already"):
        new_folder(tmp_path / "report")
