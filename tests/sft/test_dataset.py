"""From JSONL to batches: labels, masks and boundaries against the conversations themselves."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.data.vocabulary import DocumentEncoder
from dsv3_megatron.sft.chat import BadConversation, conversation_tokens
from dsv3_megatron.sft.dataset import PackedRows
from dsv3_megatron.sft.prepare import main, prepare, read_conversations, read_report
from dsv3_megatron.training.batch import PADDING

SEQ_LENGTH = 48


def conversations(count: int) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"Name function {i}" + " no" * (i % 7)},
            {"role": "assistant", "content": f"add({i})" + " yes" * (i % 5)},
        ]
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def prepared(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    lines = folder / "chats.jsonl"
    lines.write_text("\n".join(json.dumps({"messages": chat}) for chat in conversations(60)) + "\n")
    words = ["--input", str(lines), "--tokenizer", str(tokenizer_dir), "--output-dir", str(folder / "out")]
    assert main([*words, "--seq-length", str(SEQ_LENGTH), "--valid-fraction", "0.2"]) == 0
    return folder / "out"


def test_rows_hold_the_conversations_and_targets_are_their_answers(prepared: Path) -> None:
    encoder = DocumentEncoder(prepared)
    expected = sorted(
        conversation_tokens(chat, encoder.encode, encoder.special_ids) for chat in conversations(60)
    )
    report, found, targets = read_report(prepared), [], 0
    for split in ("train", "valid"):
        rows = PackedRows(prepared, split, report[split]["rows"], seed=1)
        for row in (rows[index] for index in range(len(rows))):  # access goes on into the next epochs
            assert all(
                row[name].shape == (SEQ_LENGTH,) for name in ("tokens", "labels", "loss_mask", "position_ids")
            )
            bounds = row["cu_seqlens"].tolist()
            assert bounds[0] == 0 and bounds[-1] == SEQ_LENGTH and len(bounds) == SEQ_LENGTH + 1
            for start, end in itertools.pairwise(bounds):
                ids = row["tokens"][start:end].tolist()
                if not ids or ids[0] == encoder.special_ids["<|pad_token|>"]:
                    assert row["loss_mask"][start:end].sum() == 0
                    assert set(row["position_ids"][start:end].tolist()) <= {PADDING}
                    continue
                assert row["position_ids"][start:end].tolist() == list(range(end - start))
                # What is learnt at a position is the next token of the same conversation, if it is the assistant's.
                learnt = [False, *(row["loss_mask"][start : end - 1] == 1).tolist()]
                assert row["labels"][start : end - 1].tolist() == ids[1:] and row["loss_mask"][end - 1] == 0
                found.append((ids, learnt))
                targets += sum(learnt)
            assert row["max_seqlen"] == max(b - a for a, b in itertools.pairwise(bounds))
    assert sorted(found) == expected
    assert targets == report["train"]["answer_tokens"] + report["valid"]["answer_tokens"]
    assert report["valid"]["conversations"] > 3 and report["train"]["filled"] > 0.7


def test_each_epoch_has_every_row_in_an_order_of_its_own(prepared: Path) -> None:
    rows = read_report(prepared)["train"]["rows"]
    data = PackedRows(prepared, "train", 2 * rows, seed=1)
    order = [data._row(i) for i in range(2 * rows)]
    assert sorted(order[:rows]) == sorted(order[rows:]) == list(range(rows)) and order[:rows] != order[rows:]
    # Any access order gives the same sample: what resumes and data-parallel ranks rely on.
    again = PackedRows(prepared, "train", 2 * rows, seed=1)
    assert torch.equal(again[rows + 1]["tokens"], data[rows + 1]["tokens"])
    assert [PackedRows(prepared, "train", rows, seed=2)._row(i) for i in range(rows)] != order[:rows]


def test_errors_name_the_place(tokenizer_dir: Path, tmp_path: Path) -> None:
    lines = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": conversations(1)[0]})
    for bad, problem in [
        ("{", "Expecting"),
        ('{"text": 1}', "no key 'messages'"),
        ('{"messages": []}', "no messages"),
    ]:
        lines.write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(BadConversation, match=rf"chats\.jsonl:3: .*{problem}"):
            read_conversations([lines])
    with pytest.raises(BadConversation, match="left for train: 3 were given, all longer than --seq-length 8"):
        prepare({"train": conversations(3), "valid": []}, tokenizer_dir, tmp_path / "out", seq_length=8)
    assert not (tmp_path / "out" / "sft.json").exists()


def test_too_long_conversations_are_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    chats = conversations(10)
    chats[3][0]["content"] = "no " * 100
    report = prepare({"train": chats, "valid": []}, tokenizer_dir, tmp_path, SEQ_LENGTH)
    assert report["too_long"] == 1 and report["train"]["conversations"] == 9


def test_padding_is_told_by_its_place_and_not_by_its_token(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A released tokenizer pads with its end token, which also ends answers of weight 0; a full row has no padding."""
    shutil.copytree(tokenizer_dir, tmp_path / "released")
    config = json.loads((tmp_path / "released" / "tokenizer_config.json").read_text())
    (tmp_path / "released" / "tokenizer_config.json").write_text(
        json.dumps(config | {"pad_token": "<|eos_token|>"})
    )
    chat = conversations(1)[0]
    chats: list[list[dict[str, Any]]] = [[*chat[:1], chat[1] | {"weight": 0}, *chat]]
    length = prepare({"train": chats, "valid": []}, tmp_path / "released", tmp_path / "one", 200)["train"][
        "tokens"
    ]
    for name, room in (("full", 0), ("one left", 1), ("more left", 5)):
        prepare({"train": chats, "valid": []}, tmp_path / "released", tmp_path / name, length + room)
        row = PackedRows(tmp_path / name, "train", 1, seed=0)[0]
        padded = row["position_ids"] == PADDING
        assert padded.tolist() == [False] * length + [True] * room
        end = DocumentEncoder(tmp_path / "released").special_ids["<|eos_token|>"]
        assert (row["tokens"][:length] == end).sum() == 2 and (row["tokens"][length:] == end).all()
        assert row["loss_mask"][length - 1 :].sum() == 0 and row["loss_mask"].sum() > 0
