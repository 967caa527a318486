"""Reports: the word, and what must not be in them."""

import hashlib
import json
import math
import socket

import pytest
import torch

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.prove.measure import largest, norm, number
from dsv3_megatron.prove.report import Check, Report, new_folder


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


PRIVATE = ("gpu-node17", "alice", "bob", "geheim", "corp.internal", "10.0.0.7", "models/v3", "My Home")
SECRETS = (
    "file /home/alice/models/v3/x.bin, 3/4 of it, loss 1/2, max |a - b| / max |a|",
    "on gpu-node17.cluster:29500 and [gpu-node17]:4 and 10.0.0.7:29500, megatron_core-0.19.2",
    "git+file:///home/bob/repo@abc123, git+https://tok:geheim@github.com/a/b@v1, git+https://git.corp.internal/x@v2",
    "open('/mnt/My Home/models/v3'), ~/models/v3, ~bob/x, ../models/v3, ./alice, runs/alice_2, error:/home/bob",
)
STAYS = (
    "3/4 of it, loss 1/2, max |a - b| / max |a|",
    "megatron_core-0.19.2",
    "@abc123",
    "github.com/a/b@v1",
    "@v2",
)


@pytest.fixture
def somebody(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-node17.cluster")
    monkeypatch.setattr("platform.node", lambda: "gpu-node17")
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("USER", "alice")


def test_nothing_private_is_written(tmp_path, monkeypatch, somebody):
    monkeypatch.chdir(tmp_path)
    secret = "; ".join([*SECRETS, f"here {tmp_path}/y, given given/models/v3"])
    report = Report(
        "commit", secret, [Check("c", secret, "how", False, 1, math.inf, secret)], [secret], {secret: secret}
    )
    report.tables["table"] = [{"name": secret, secret: 1}]
    report.write(tmp_path / "report", {"given/models/v3": "<hf>"})
    files = {file.name: file.read_text() for file in (tmp_path / "report").iterdir()}
    assert files.keys() == {"report.json", "report.md", "table.json"}
    for text in files.values():
        for word in (*PRIVATE, str(tmp_path), tmp_path.name):
            assert word not in text, word
        for word in STAYS:
            assert word in text or word.replace("|", "\\|") in text, word
    assert json.loads(files["report.json"])["checks"][0]["worst"] == "inf"
    assert {file.name for file in tmp_path.iterdir()} == {"report"}


def test_it_is_signed_off(tmp_path):
    report = Report(
        "layout", "…", [Check("a", "b", "c", False)], tables={"gradients": [{"name": "x", "off": 1.0}]}
    )
    report.write(tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    last = text.split("## Signed off")[1]
    assert "**refuted**" in last
    rows = [line.split() for line in last.splitlines() if line.startswith("    ")]
    assert [name for _, name in rows] == ["report.json", "gradients.json"]
    for digest, name in rows:
        assert digest == hashlib.sha256((tmp_path / "report" / name).read_bytes()).hexdigest()


def test_the_word_is_no_secret(monkeypatch):
    monkeypatch.setenv("USER", "proved")
    report = Report("layout", "…", [Check("a", "b", "c", True)])
    assert report.public()["word"] == "proved" and report.public()["kind"] == "layout"


def test_a_folder_that_is_there_is_refused(tmp_path):
    (tmp_path / "report").mkdir()
    new_folder(tmp_path / "report")
    (tmp_path / "report" / "x").write_text("")
    with pytest.raises(RefusedArgument, match="is there already"):
        new_folder(tmp_path / "report")
    with pytest.raises(RefusedArgument, match="nothing can be written in"):
        new_folder(tmp_path / "report" / "x" / "y")


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    report = Report("layout", "…", [Check("a", "b", "c", True)], tables={"no/name": []})
    with pytest.raises(RefusedArgument, match=r"^--output \S*report: No such file"):
        report.write(tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


ONE, NAN = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])


@pytest.mark.parametrize("measure", [largest, norm])
def test_what_is_no_number_is_infinitely_far(measure):
    assert measure(ONE, ONE) == 0 == measure(0 * ONE, 0 * ONE)
    assert measure(2 * ONE, 2.2 * ONE) == pytest.approx(0.1, rel=0.1)
    for pair in (
        (ONE, ONE[:2]),
        (ONE, ONE[None]),
        (ONE, NAN),
        (NAN, ONE),
        (NAN, NAN),
        (0 * ONE, ONE / 0),
        (ONE / 0, ONE / 0),
    ):
        assert measure(*pair) == math.inf
    assert measure(*((0 * ONE, ONE) if measure is largest else (ONE, 0 * ONE))) == math.inf


def test_numbers():
    assert number(1.0, 1.0) == 0 == number(None, None) == number(0.0, 0.0)
    assert number(1.0, 1.25) == pytest.approx(0.2) == number(1.25, 1.0)
    for pair in ((1.0, None), (None, 1.0), (math.nan, math.nan), (1.0, math.inf), (math.inf, math.inf)):
        assert number(*pair) == math.inf
