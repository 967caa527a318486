"""`data.prepare --tokenizer`: a released tokenizer, whatever its special tokens are called."""

import json
from pathlib import Path

import pytest

from dsv3_megatron.data.prepare import main
from dsv3_megatron.data.punctuation import merged_tokens
from dsv3_megatron.data.vocabulary import EOS, FIM_BEGIN, FIM_END, FIM_HOLE, PAD, DocumentEncoder
from tests.data.test_prepare import read_documents
from tests.sft.released import EOS as RELEASED_EOS
from tests.sft.released import TOOLS_IN_TOKENS, released

TEXTS = [f"Paris {i}: <｜User｜>, {RELEASED_EOS} and <think> are words here.\n" for i in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path / "corpus.json"


def words(corpus: Path, tokenizer: Path, output: Path, *more: str) -> list[str]:
    given = [
        "--input",
        str(corpus),
        "--output-dir",
        str(output),
        "--tokenizer",
        str(tokenizer),
        "--workers",
        "1",
    ]
    return [*given, "--valid-fraction", "0.2", "--split-rate", "0", *more]


def test_documents_end_with_its_own_end_and_text_stays_text(corpus: Path, tmp_path: Path) -> None:
    tokenizer = released(tmp_path / "released", TOOLS_IN_TOKENS)
    (tokenizer / "train.bin").write_bytes(b"not of the tokenizer")
    assert main(words(corpus, tokenizer, tmp_path / "out", "--fim-rate", "0")) == 0
    encoder = DocumentEncoder(tmp_path / "out")
    documents = [ids for split in ("train", "valid") for ids in read_documents(tmp_path / "out" / split)]
    assert sorted(encoder.decode(ids) for ids in documents) == sorted(text + RELEASED_EOS for text in TEXTS)
    end, user = encoder.special_ids[EOS], encoder._tokenizer.token_to_id("<｜User｜>")
    assert all(ids.count(end) == 1 and user not in ids for ids in documents)
    assert (
        encoder.special_ids[PAD] == end
        and encoder.vocab_size == max(encoder._tokenizer.get_vocab().values()) + 1
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "tokenizer.json", "tokenizer_config.json", "train.bin", "train.idx", "valid.bin", "valid.idx", "prepared.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "train.bin").read_bytes() != b"not of the tokenizer"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    # The same command again is done; with another tokenizer it is refused.
    assert main(words(corpus, tokenizer, tmp_path / "out", "--fim-rate", "0")) == 0
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 500, "content": "<|new|>"})
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    assert main(words(corpus, tokenizer, tmp_path / "out", "--fim-rate", "0")) == 1


def test_fim_tokens_are_wanted_for_fim_only(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = released(tmp_path / "released", None)
    assert main(words(corpus, tokenizer, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "--fim-rate 0.1 (0: no FIM): " in said and "lacks the special tokens <|fim_begin|>" in said
    assert not (tmp_path / "out" / "train.bin").exists()
    # The released names of the three.
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    last = content["added_tokens"][-1]
    for number, name in enumerate(("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), last["id"] + 1):
        content["added_tokens"].append(last | {"id": number, "content": name})
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    assert main(words(corpus, tokenizer, tmp_path / "fim", "--fim-rate", "1")) == 0
    encoder = DocumentEncoder(tmp_path / "fim")
    for ids in read_documents(tmp_path / "fim" / "train"):
        assert [ids.count(encoder.special_ids[name]) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)] == [1, 1, 1]


@pytest.mark.parametrize("place", ["special_tokens_map.json", "generation_config.json"])
def test_the_end_is_found_where_it_is_said(place: str, tmp_path: Path) -> None:
    tokenizer = released(tmp_path / "released", None, eos_token=None, pad_token=None)
    with pytest.raises(ValueError, match="names no eos_token"):
        DocumentEncoder(tokenizer)
    number = DocumentEncoder(released(tmp_path / "other", None)).special_ids[EOS]
    content = {"eos_token": RELEASED_EOS} if place.startswith("special") else {"eos_token_id": [number]}
    (tokenizer / place).write_text(json.dumps(content))
    encoder = DocumentEncoder(tokenizer)
    assert encoder.special_ids[EOS] == number == encoder.pad_id and PAD not in encoder.special_ids


@pytest.mark.parametrize(
    "more, message",
    [
        (("--vocab-size", "300"), "give one of the two"),
        (("--tokenizer", "nowhere"), "--tokenizer nowhere: no such folder"),
    ],
)
def test_refusals(
    more: tuple[str, ...], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = released(tmp_path / "released", None)
    assert main(words(corpus, tokenizer, tmp_path / "out", "--fim-rate", "0", *more)) == 1
    assert message in capsys.readouterr().err
    neither = ["--input", str(corpus), "--output-dir", str(tmp_path / "out")]
    assert main(neither) == 1 and "--vocab-size N trains a tokenizer" in capsys.readouterr().err
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "tiktoken.model").write_text("")
    assert main(words(corpus, tokenizer, tmp_path / "out", "--fim-rate", "0")) == 1
    assert "tokenizer.json is not there (tiktoken.model is there" in capsys.readouterr().err


def test_half_characters_are_not_split() -> None:
    """A released token may hold the last bytes of a mark and a line break: its parts would be other text."""
    texts = {0: "\ufffd\n", 1: ":\n", 2: "。\n"}
    assert merged_tokens(texts, lambda text: [len(text)]).keys() == {1, 2}
