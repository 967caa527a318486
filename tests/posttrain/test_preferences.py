"""Preferences from Hugging Face's forms to rows: what is learnt of which pair, and what becomes of bad ones."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.data.vocabulary import BOS, EOS, DocumentEncoder
from dsv3_megatron.posttrain.dataset import PreferenceRows
from dsv3_megatron.posttrain.prepare import main, read_preferences, read_report
from dsv3_megatron.sft.chat import BadConversation, conversation_tokens

SEQ_LENGTH = 64


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TURNS = [user("Name it"), assistant("add"), user("Yes?")]
# The same pair of answers to the same prompt in each form of messages.
FORMS: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": TURNS, "chosen": [assistant("yes")], "rejected": [assistant("no no")]},
    "implicit": {"chosen": [*TURNS, assistant("yes")], "rejected": [*TURNS, assistant("no no")]},
    "mixed": {
        "prompt": "Name it",
        "chosen": [*TURNS, assistant("yes")],
        "rejected": [*TURNS, assistant("no no")],
        "score_chosen": 4.0,
        "score_rejected": 1.0,
    },
}


def write(folder: Path, *records: Any) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return file


def run(file: Path, tokenizer: Path, out: Path, *words: str, seq_length: int = SEQ_LENGTH) -> int:
    fixed = ["--input", str(file), "--tokenizer", str(tokenizer), "--output-dir", str(out)]
    return main([*fixed, "--seq-length", str(seq_length), "--valid-fraction", "0", *words])


def samples(folder: Path, split: str = "train") -> dict[int, tuple[list[int], list[bool]]]:
    """Sequence number → ids and what is learnt, read back through the data set."""
    found = {}
    rows = PreferenceRows(folder, split, read_report(folder)[split]["rows"], seed=0)
    for row in (rows[i] for i in range(len(rows))):
        bounds = row["cu_seqlens"].unique().tolist()
        for start, end in itertools.pairwise(bounds):
            numbers = set(row["sequence"][start:end].tolist()) - {-1}
            if not numbers:
                continue  # padding
            (number,) = numbers
            learnt = [False, *(row["sequence"][start : end - 1] == number).tolist()]
            assert row["sequence"][end - 1] == -1 and row["position_ids"][start:end].tolist() == list(
                range(end - start)
            )
            found[number] = (row["tokens"][start:end].tolist(), learnt)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_messages_in_each_form_learn_the_answers_alone(
    form: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    assert run(write(tmp_path, FORMS[form]), tokenizer_dir, tmp_path / "out") == 0
    encoder = DocumentEncoder(tokenizer_dir)
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2]]
    expected = {
        side: conversation_tokens([*turns, assistant(text)], encoder.encode, encoder.special_ids)
        for side, text in enumerate(("yes", "no no"))
    }
    found = samples(tmp_path / "out")
    assert found == expected
    assert (
        sum(found[0][1]) == len(encoder.encode("yes")) + 1
    )  # and the end token: not the first turn's answer


@pytest.mark.parametrize("begin, token", [("begin", BOS), ("end", EOS)])
def test_texts_are_prompt_and_answer_without_a_template(
    begin: str, token: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    explicit = {"prompt": "add it: ", "chosen": "yes", "rejected": "no"}
    implicit = {"chosen": "add it: yes", "rejected": "add it: no"}
    assert (
        run(write(tmp_path, explicit, implicit), tokenizer_dir, tmp_path / "out", "--text-begin", begin) == 0
    )
    encoder = DocumentEncoder(tokenizer_dir)
    found = samples(tmp_path / "out")
    for pair, side in itertools.product(range(2), range(2)):
        before = [encoder.special_ids[token], *encoder.encode("add it: ")]
        after = [*encoder.encode(("yes", "no")[side]), encoder.special_ids[EOS]]
        assert found[2 * pair + side] == ([*before, *after], [False] * len(before) + [True] * len(after))


def test_bad_pairs_are_left_out_and_counted(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = {"prompt": "first", "chosen": "yes", "rejected": "no"}
    bad = [
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": [user("p")], "chosen": [assistant("same")], "rejected": [assistant("same")]},
        {"chosen": [user("p"), assistant("same")], "rejected": [user("p"), assistant("same")]},
        {"prompt": "p", "chosen": "", "rejected": "no"},
        {"prompt": "p", "chosen": "yes", "rejected": "  "},
        {"prompt": [user("p")], "chosen": [assistant("")], "rejected": [assistant("no")]},
        {"prompt": "p", "chosen": "yes " * 200, "rejected": "no"},
        # Each answer fits into a row, both do not.
        {"prompt": "p", "chosen": "add(first) " * 9, "rejected": "return add " * 9},
    ]
    assert run(write(tmp_path, *bad[:4], good, *bad[4:]), tokenizer_dir, tmp_path / "out") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["equal"], report["empty"], report["too_long"]) == (3, 3, 2)
    assert report["train"]["pairs"] == 1 and report["train"]["given"] == 9
    assert set(samples(tmp_path / "out")) == {0, 1}
    assert run(write(tmp_path, *bad), tokenizer_dir, tmp_path / "none") == 1
    assert "no pair is left to train on" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_length_or_a_folder_that_cannot_be_is_one_line(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = write(tmp_path, {"prompt": "p", "chosen": "yes", "rejected": "no"})
    for length in (3 * 10**9, 10**12):
        assert run(file, tokenizer_dir, tmp_path / "out", seq_length=length) == 1
        assert capsys.readouterr().err == f"error: --seq-length {length}: must be at most 16777216\n"
    assert run(file, tokenizer_dir, file) == 1
    assert capsys.readouterr().err == f"error: --output-dir {file}: is a file; name a folder\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "record, text",
    [
        ({"chosen": "a"}, "no key 'rejected'"),
        ({"chosen": "a", "rejected": [assistant("b")]}, "both texts, or both lists"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "comment": "c"}, "--ignore-key comment"),
        ({"prompt": [user("p")], "chosen": "a", "rejected": "b"}, "prompt: a text"),
        ({"chosen": "yes", "rejected": "no"}, "do not begin alike"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
            "do not begin with the same",
        ),
        ({"prompt": "other", **FORMS["implicit"]}, "not what the user says"),
        ("no json", "pairs.jsonl:1"),
    ],
)
def test_records_that_are_no_pairs_name_their_line_and_key(record: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(BadConversation, match=r"pairs\.jsonl:1") as error:
        read_preferences([write(tmp_path, record)])
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_is_in_one_split_only_and_pairs_are_numbered_through(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    records = [{"prompt": f"p{i % 20}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    assert run(write(tmp_path, *records), tokenizer_dir, tmp_path / "out", "--valid-fraction", "0.3") == 0
    report, encoder = read_report(tmp_path / "out"), DocumentEncoder(tokenizer_dir)
    train, valid = samples(tmp_path / "out"), samples(tmp_path / "out", "valid")
    first = 2 * report["train"]["pairs"]
    assert sorted(train) == list(range(first)) and sorted(valid) == list(range(first, 120)) and len(valid) > 4

    def prompts(found: dict[int, tuple[list[int], list[bool]]]) -> set[str]:
        return {encoder.decode(ids[1 : learnt.index(True)]) for ids, learnt in found.values()}

    assert not prompts(train) & prompts(valid)


def test_the_mtp_layer_learns_chosen_answers_or_nothing(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [{"prompt": "p", "chosen": "yes " * n, "rejected": "no " * n} for n in (1, 2, 3)]
    assert run(write(tmp_path, *records), tokenizer_dir, tmp_path / "out") == 0
    rows = read_report(tmp_path / "out")["train"]["rows"]
    sums: dict[int, float] = {}
    for mtp in (False, True):
        for row in (PreferenceRows(tmp_path / "out", "train", rows, 0, mtp)[i] for i in range(rows)):
            if not mtp:
                assert not row["loss_mask"].any()
                continue
            assert not row["loss_mask"][
                row["sequence"] % 2 != 0
            ].any()  # neither rejected nor of none (−1 is odd)
            for number in set(row["sequence"].tolist()) - {-1}:
                sums[number] = float(row["loss_mask"][row["sequence"] == number].sum())
    assert sums == pytest.approx({0: 1, 1: 0, 2: 1, 3: 0, 4: 1, 5: 0})
    assert torch.is_tensor(row["loss_mask"]) and row["loss_mask"].dtype == torch.float32
