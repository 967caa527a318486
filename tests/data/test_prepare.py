"""The command: what Megatron reads back, the split, the round trip of text, resuming, and refusals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from dsv3_megatron.data import prepare as prepare_module
from dsv3_megatron.data.documents import InputError, document_id, is_validation
from dsv3_megatron.data.encode import token_dtype
from dsv3_megatron.data.prepare import PrepareSettings, main
from dsv3_megatron.data.vocabulary import MIN_VOCAB_SIZE, SPECIAL_TOKENS, DocumentEncoder, train_tokenizer

OUTPUTS = ("tokenizer.json", "tokenizer_config.json", "train.bin", "train.idx", "valid.bin", "valid.idx")
WORDS = ["def", "class", "self", "<|eos_token|>", "é", "漢字", "12345", ":\n", "(x);", "\n\n", "\t", "#"]


def make_texts(num: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"document {i} " + " ".join(rng.choices(WORDS, k=60)) for i in range(num)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """200 documents, half in JSONL and half in text files; their texts in the order in which they are
    read."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(200)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:100]))
    for i, text in enumerate(texts[100:]):
        (folder / f"b{i:03d}.txt").write_text(text)
    return SimpleNamespace(folder=folder, texts=texts)


def arguments(corpus, output, *more: str) -> list[str]:
    paths = ["--input", str(corpus.folder), "--output-dir", str(output)]
    sizes = ["--vocab-size", "400", "--valid-fraction", "0.2", "--shard-bytes", "4000", "--workers", "1"]
    return paths + sizes + list(more)


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared")
    assert main(arguments(corpus, output, "--fim-rate", "0.5")) == 0
    return output


def contents(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def read_documents(prefix) -> list[list[int]]:
    """Token ids of each document, read with Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert len(dataset.document_indices) == len(dataset) + 1  # one sequence per document
    return [dataset[i].tolist() for i in range(len(dataset))]


def plain_text(decoded: str) -> str:
    """The document that a decoded training document stands for, by the report's format."""
    body = decoded.removesuffix("<|eos_token|>")
    if not body.startswith("<|fim_begin|>"):
        return body
    prefix, rest = body.removeprefix("<|fim_begin|>").split("<|fim_hole|>")
    suffix, middle = rest.split("<|fim_end|>")
    return prefix + middle + suffix


def test_megatron_reads_every_document_once_in_its_split(corpus, prepared):
    encoder = DocumentEncoder(prepared)
    train = [encoder.decode(ids) for ids in read_documents(prepared / "train")]
    valid = [encoder.decode(ids) for ids in read_documents(prepared / "valid")]
    held_out = [is_validation(document_id(text), 0.2) for text in corpus.texts]
    assert [plain_text(text) for text in train] == [
        text for text, out in zip(corpus.texts, held_out, strict=True) if not out
    ]
    assert valid == [text + "<|eos_token|>" for text, out in zip(corpus.texts, held_out, strict=True) if out]
    num_fim = sum(text.startswith("<|fim_begin|>") for text in train)
    assert abs(num_fim - len(train) / 2) < 5 * (len(train) / 4) ** 0.5

    report = json.loads((prepared / "prepared.json").read_text())
    assert report["fim_documents"] == num_fim
    assert (report["train_documents"], report["valid_documents"]) == (len(train), len(valid))
    assert report["train_tokens"] * 2 == (prepared / "train.bin").stat().st_size  # uint16
    assert not (prepared / ".prepare").exists()


def test_special_tokens_of_the_text_stay_text(corpus, prepared):
    """`<|eos_token|>` is a word of the corpus: only the one after the document may be the special token."""
    assert any("<|eos_token|>" in text for text in corpus.texts)
    eos = DocumentEncoder(prepared).special_ids["<|eos_token|>"]
    for split in ("train", "valid"):
        for ids in read_documents(prepared / split):
            assert ids.count(eos) == 1 and ids[-1] == eos


def test_megatron_tokenizer_offline(prepared, monkeypatch):
    """What `--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR` builds, with any network access
    failing."""
    import socket

    from megatron.core.tokenizers import MegatronTokenizer

    def refuse(*args, **kwargs):
        raise AssertionError("network access")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(prepared), metadata_path={"library": "huggingface"}
    )
    encoder = DocumentEncoder(prepared)
    assert tokenizer.vocab_size == encoder.vocab_size == 400
    assert tokenizer.eod == encoder.special_ids["<|eos_token|>"]
    assert tokenizer.pad == encoder.special_ids["<|pad_token|>"] != tokenizer.eod
    text = "def f(x):\n\n    return 'é漢字\U0001f600\x00'\r\n\t  12345"
    ids = tokenizer.tokenize(text)
    assert ids == encoder.encode(text)
    assert tokenizer.detokenize(ids) == encoder.decode(ids) == text
    # Prompts are written with sentinels, so here, unlike in documents, they are the special tokens.
    assert tokenizer.tokenize("".join(SPECIAL_TOKENS)) == [encoder.special_ids[t] for t in SPECIAL_TOKENS]


def test_tokens_join_punctuation_with_line_breaks_but_not_long_numbers():
    tokenizer = train_tokenizer(["(x):\n\n1234567 " * 50], vocab_size=400)
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("(x):\n\n1234567 y")]
    assert pieces == ["(", "x", "):ĊĊ", "123", "456", "7", "Ġy"]
    with pytest.raises(ValueError, match=r"--vocab-size 100 is too small.*264"):
        train_tokenizer(["x"], vocab_size=100)
    assert MIN_VOCAB_SIZE == 264


def test_dtype_is_megatrons():
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (400, 65499, 65500, 129280):
        assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)
    assert np.iinfo(token_dtype(65499)).max >= 65499


def test_workers_and_shard_size_do_not_change_the_documents(corpus, prepared, tmp_path):
    # The last --shard-bytes and --workers win: 7 kB shards cut the files elsewhere, two processes encode
    # them.
    more = ("--fim-rate", "0.5", "--workers", "2", "--shard-bytes", "7000")
    assert main(arguments(corpus, tmp_path, *more)) == 0
    assert contents(tmp_path) == contents(prepared)


def test_interrupted_run_goes_on(corpus, prepared, tmp_path, monkeypatch, capsys):
    encoded = []
    real = prepare_module.encode_shard

    def interrupted_at_third(pieces, tokenizer_dir, output, settings):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(output.name)
        return real(pieces, tokenizer_dir, output, settings)

    def counting(pieces, tokenizer_dir, output, settings):
        encoded.append(output.name)
        return real(pieces, tokenizer_dir, output, settings)

    monkeypatch.setattr(prepare_module, "encode_shard", interrupted_at_third)
    assert main(arguments(corpus, tmp_path, "--fim-rate", "0.5")) == 130
    assert not (tmp_path / "train.bin").exists()
    monkeypatch.setattr(prepare_module, "encode_shard", counting)
    monkeypatch.setattr(prepare_module, "train_tokenizer", None)  # must not be trained again
    assert main(arguments(corpus, tmp_path, "--fim-rate", "0.5")) == 0
    assert len(encoded) == len(set(encoded)) > 5  # no shard twice
    assert "going on: 2 of" in capsys.readouterr().err
    assert contents(tmp_path) == contents(prepared)

    # A finished folder is left alone; with other settings it is refused, and nothing changes.
    before = len(encoded)
    assert main(arguments(corpus, tmp_path, "--fim-rate", "0.5")) == 0
    assert len(encoded) == before
    assert main(arguments(corpus, tmp_path, "--fim-rate", "0.4")) == 1
    assert "holds another preparation" in capsys.readouterr().err
    assert contents(tmp_path) == contents(prepared)


def test_killed_run_goes_on(corpus, prepared, tmp_path):
    """SIGKILL in the middle of encoding leaves only whole shards, and the next run ends with the same
    files."""
    command = [sys.executable, "-c", SLOW_PREPARE, *arguments(corpus, tmp_path, "--fim-rate", "0.5")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob(".prepare/shard-*.npz"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".prepare/shard-*.npz")}
    assert len(kept) >= 2 and not (tmp_path / "train.bin").exists()

    seen = {}
    real = prepare_module._merge

    def merge(num_shards, work_dir, output_dir, counts):
        seen.update({path.name: path.stat().st_mtime_ns for path in work_dir.glob("shard-*.npz")})
        return real(num_shards, work_dir, output_dir, counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_merge", merge)
        assert main(arguments(corpus, tmp_path, "--fim-rate", "0.5")) == 0
    assert kept.items() < seen.items()  # finished shards were not written again
    assert contents(tmp_path) == contents(prepared)


# The command, slowed down so that the kill comes between shards.
SLOW_PREPARE = """
import sys, time
from dsv3_megatron.data import prepare
real = prepare.encode_shard
def slow(*args):
    time.sleep(0.2)
    return real(*args)
prepare.encode_shard = slow
sys.exit(prepare.main(sys.argv[1:]))
"""


def test_bad_input_fails_with_file_and_line(corpus, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\nnot json\n')
    for workers in ("1", "2"):
        output = tmp_path / f"out{workers}"
        argv = ["--input", str(corpus.folder), str(bad), "--output-dir", str(output), "--vocab-size", "300"]
        assert main([*argv, "--workers", workers]) == 1
        assert f"error: {bad}:2: not valid JSON" in capsys.readouterr().err
        assert not (output / "train.bin").exists() and not (output / "prepared.json").exists()


def test_bad_input_in_a_worker_process_is_named(corpus, tmp_path):
    """An error of an encoding process reaches the parent as it was raised."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\nnot json\n')
    work = tmp_path / "work"
    work.mkdir()
    settings = PrepareSettings(vocab_size=300)
    good = prepare_module.plan_shards([corpus.folder / "a.jsonl"], 10_000)
    prepare_module._make_tokenizer(good, work / "tokenizer", settings)
    shards = [*good, *prepare_module.plan_shards([bad], 10_000)]
    with pytest.raises(InputError, match=r"bad\.jsonl:2: not valid JSON"):
        prepare_module._encode(shards, work, settings.encode, workers=2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--valid-fraction", "1.5"), "--valid-fraction 1.5: must be from 0 to 1"),
        (("--fim-rate", "-0.1"), "--fim-rate -0.1: must be from 0 to 1"),
        (("--vocab-size", "200"), "--vocab-size 200 is too small"),
        (("--workers", "0"), "--workers 0: must be at least 1"),
        (("--shard-bytes", "0"), "--shard-bytes 0: must be at least 1"),
        (("--seed", "-1"), "--seed -1: must not be negative"),
        (("--valid-fraction", "0.0000001"), "raise --valid-fraction"),
        (("--valid-fraction", "1"), "no document is left to train on"),
    ],
)
def test_refusals_name_option_and_fix(corpus, tmp_path, capsys, more, message):
    assert main(arguments(corpus, tmp_path, *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "prepared.json").exists()
