"""The demonstration's family; prompts; rollouts as rows."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.posttrain import counting
from dsv3_megatron.posttrain.journal import JOURNAL, Journal, read_journal
from dsv3_megatron.posttrain.policy_training import PolicyTraining
from dsv3_megatron.posttrain.rollouts import Sample, chosen_prompts, mtp_weights, read_prompts, row_of
from dsv3_megatron.posttrain.run import Kept, checkpoints
from dsv3_megatron.sft.rendering import Rendering
from dsv3_megatron.training.batch import PADDING


def test_counting_has_held_out_problems_of_its_own() -> None:
    train = {prompt for prompt, _ in counting.problems(500, 0, held_out=False)}
    held_out = {prompt for prompt, _ in counting.problems(200, 0, held_out=True)}
    read = {text[: counting.PROMPT] for text in counting.documents(2000, 0)}
    assert not held_out & (train | read) and len(held_out) > 30
    answers = {prompt[-1]: answer for prompt, answer in counting.problems(50, 3, held_out=True)}
    assert answers == {"5": "6789", "6": "789", "7": "89"}
    assert counting.reward("406", "789", "789") == 1
    assert counting.reward("406", "7890", "789") == counting.reward("406", "78", "789") == 0


def test_a_row_holds_samples_apart_and_learns_responses_alone() -> None:
    row = row_of([(4, [9, 8, 7, 1], 2), (-1, [9, 6, 1], 1), (5, [9, 2, 1], 2)], 12, pad_id=0, mtp=None)
    assert row["tokens"].tolist() == [9, 8, 7, 1, 9, 6, 1, 9, 2, 1, 0, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, PADDING, PADDING]
    assert row["cu_seqlens"].tolist() == [0, 4, 7, 10, *[12] * 9] and row["max_seqlen"] == 4
    # Where the label is of a response: tokens 7, 1 of sample 4 and token 1 of sample 5; sample −1 is not learnt from.
    assert row["sequence"].tolist() == [-1, 4, 4, -1, -1, -1, -1, -1, 5, -1, -1, -1]
    assert row["labels"][1] == 7 and not row["loss_mask"].any()
    full = row_of([(0, [9] * 6, 1), (1, [9] * 6, 5)], 12, 0, lambda s: mtp_weights(s, "sequence"))
    assert full["cu_seqlens"].unique().tolist() == [0, 6, 12]
    assert full["loss_mask"].tolist() == pytest.approx([0.2] * 5 + [0] + [0] * 4 + [1, 0])
    assert torch.equal(mtp_weights(full["sequence"], "token"), (full["sequence"] >= 0).float())
    with pytest.raises(ValueError, match="13 tokens do not fit"):
        row_of([(0, [1] * 13, 1)], 12, 0, None)


def test_prompts_come_in_epochs_each_in_another_order() -> None:
    order = [i for rollout in range(4) for i in chosen_prompts(6, 3, rollout, seed=1)]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6)) and order[:6] != order[6:]
    assert chosen_prompts(6, 3, 1, seed=1) == order[3:6]  # by its number alone: what a resumed run relies on


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ab", "answer": 3}\n{"prompt": [{"role": "user", "content": "x"}]}\n')
    found = read_prompts(file, lambda text: [len(text)], lambda messages: [7])
    assert [(p.tokens, p.answer) for p in found] == [([2], 3), ([7], None)] and found[0].text == "ab"
    for text, problem in (
        ('{"question": 1}', "no key 'prompt'"),
        ('{"prompt": ""}', "neither"),
        ("[", "not valid JSON"),
    ):
        file.write_text(text + "\n")
        with pytest.raises(ValueError, match=problem):
            read_prompts(file, lambda text: [1], lambda messages: [1])


def policy(prompts: Path, tokenizer: Path, **changes: Any) -> PolicyTraining:
    """As the trainer makes it; nothing of Megatron's is asked for before the first step."""
    args = {
        "posttrain": "grpo", "save": None, "tokenizer_model": str(tokenizer), "prompt_data": str(prompts),
        "text_begin": "begin", "seq_length": 32, "samples_per_prompt": 4, "prompts_per_rollout": 2,
        "global_batch_size": 8, "updates_per_rollout": 1, "max_response_length": 8, "rollout_temperature": 1.0,
        "reward": "answer", "reward_timeout": 1.0, "bad_reward": 0.0,
    }  # fmt: skip
    return PolicyTraining(Namespace(**(args | changes)))


def test_prompts_without_room_for_a_response_are_left_out(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [{"prompt": "a" * n} for n in (3, 200, 5)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [p.text for p in policy(file, tokenizer_dir).prompts] == ["aaa", "aaaaa"]
    assert "1 of 3 prompts are longer than 24 tokens, and left out" in capsys.readouterr().out
    with pytest.raises(RefusedArgument, match="leave 0 tokens for each prompt, which none fits into"):
        policy(file, tokenizer_dir, global_batch_size=2)  # four samples in a row


def test_prompts_of_messages_read_the_tokenizer_once_and_name_their_line(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Rendering] = []
    build = Rendering.build

    def counted(self: Rendering) -> Any:
        built.append(self)
        return build(self)

    monkeypatch.setattr(Rendering, "build", counted)
    file = tmp_path / "prompts.jsonl"
    good = json.dumps({"prompt": [{"role": "user", "content": "x"}]}) + "\n"
    file.write_text(good * 3)
    assert len(policy(file, tokenizer_dir).prompts) == 3 and len(built) == 1
    file.write_text(good + json.dumps({"prompt": [{"role": "user"}]}) + "\n")
    with pytest.raises(RefusedArgument, match=r"^--prompt-data .*prompts\.jsonl:2: prompt: .* no text"):
        policy(file, tokenizer_dir)


def test_a_checkpoint_finds_what_was_kept_for_it(tmp_path: Path) -> None:
    kept, other = Kept(tmp_path, "rollout"), Kept(tmp_path, "rollout_more")
    assert kept.iterations() == [] and checkpoints(str(tmp_path)) == []
    for iteration in (0, 16, 96, 112, 128):
        kept.file(iteration).write_text("")
    other.file(5).write_text("")
    (tmp_path / "rollout_from_144.pt.part").write_text("")  # its writer was killed
    for name in ("iter_0000020", "iter_0000100", "iter_0000112", "iter_old", "posttrain"):
        (tmp_path / name).mkdir()
    kept.keep(saved - saved % 16 for saved in checkpoints(str(tmp_path)))
    assert kept.iterations() == [16, 96, 112, 128] and other.iterations() == [5]
    (tmp_path / "iter_0000020").rmdir()
    kept.keep(saved - saved % 16 for saved in checkpoints(str(tmp_path)))
    assert kept.iterations() == [96, 112, 128]


def test_a_run_that_is_killed_as_it_goes_on_keeps_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / JOURNAL
    file.write_text('{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "loss": 1.0}\n{"iteration": 3, "lo')
    before = file.read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", killed)  # everything is written, and not yet in its place
        with pytest.raises(KeyboardInterrupt):
            Journal(tmp_path, 1)
    assert file.read_bytes() == before
    Journal(tmp_path, 1)
    assert read_journal(file) == [{"iteration": 1, "loss": 2.0}]


def test_samples_without_numbers_are_not_usable() -> None:
    assert Sample(0, [1, 2], [-0.5, -1.0], True, 1.0).usable
    assert not Sample(0, [1, 2], [-0.5, math.nan], True, 1.0).usable
