"""`dsv3 sample`: what is kept is what the filter says; resumed, filtered again, refused."""

import json
from types import SimpleNamespace

import pytest

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.serve.prompts import read_prompts
from dsv3_megatron.serve.sample import _messages, _text, main, read_filter
from dsv3_megatron.serve.tokenizer import Tokenizer
from tests.rewards.vowels import vowels
from tests.serve.test_generate import read, write
from tests.sft.conftest import tokenizer_dir

__all__ = ["tokenizer_dir"]

ME = "tests.rewards.vowels:vowels"


def words(folder, questions, output, *more):
    return [
        "--hf", str(folder), "--prompts", str(questions), "--output", str(output), "--device", "cpu", "--samples", "3",
        "--max-new-tokens", "8", "--json", "--ignore-eos", *more,
    ]  # fmt: skip


@pytest.fixture
def questions(tmp_path):
    lines = [
        {"prompt": "def add", "answer": 0},
        {"prompt": "Name", "answer": 1},
        {"prompt": "No", "answer": "broken"},
    ]
    return write(tmp_path / "problems.jsonl", *lines)


def test_samples_are_kept_by_their_reward(hf, questions, tmp_path, capsys, monkeypatch):
    output = tmp_path / "kept.jsonl"
    assert (
        main(words(hf, questions, output, "--reward", ME, "--filter", "reward>=1", "--filter", "reward<9"))
        == 0
    )
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert list(result) == ["prompts", "samples", "kept", "prompts_kept", "mean_reward", "failed"]
    assert (result["prompts"], result["samples"], result["failed"]) == (3, 9, 3)
    samples = [line["text"] for line in read(output.with_name("kept.jsonl.samples.jsonl"))]
    assert len(set(samples[:3])) == 3, "samples of a prompt are drawn apart"
    expected = [
        vowels("", text, answer) for text, answer in zip(samples[:6], [0, 0, 0, 1, 1, 1], strict=True)
    ]
    kept = read(output)
    assert [line["reward"] for line in kept] == [value for value in expected if 1 <= value < 9]
    assert {3, 4, 5} == {3 * line["prompt_id"] + line["sample"] for line in kept}
    assert kept[0]["messages"] == [
        {"role": "user", "content": "Name"},
        {"role": "assistant", "content": samples[3]},
    ]
    assert result["mean_reward"] == pytest.approx(sum(expected) / 9)

    # Another filter: nothing is sampled or scored again.
    monkeypatch.setattr("dsv3_megatron.rewards.Scorer.score", None)
    before = output.with_name("kept.jsonl.samples.jsonl").read_bytes()
    assert main(words(hf, questions, output, "--reward", ME, "--filter", f"{ME}<1")) == 0
    assert [line["reward"] for line in read(output)] == [value for value in expected if value < 1]
    assert output.with_name("kept.jsonl.samples.jsonl").read_bytes() == before

    # Cut short in both files: the rest is done again, with the same samples.
    monkeypatch.undo()
    for name in ("samples", "rewards"):
        file = output.with_name(f"kept.jsonl.{name}.jsonl")
        file.write_bytes(file.read_bytes()[:-100])
    assert main(words(hf, questions, output, "--reward", ME, "--filter", "reward>=1")) == 0
    assert output.with_name("kept.jsonl.samples.jsonl").read_bytes() == before
    assert read(output) == kept


def test_prompts_of_messages_are_rendered_and_kept_with_what_was_said(tokenizer_dir, tmp_path):
    """As in GRPO: the same tokens, the same text for the reward; only the kept answer is learnt later."""
    tokenizer = Tokenizer(tokenizer_dir)
    source = SimpleNamespace(need_tokenizer=lambda what: tokenizer, decode=tokenizer.decode)
    said = [
        {"role": "user", "content": "Name it"},
        {"role": "assistant", "content": "add"},
        {"role": "user", "content": "Yes?"},
    ]
    file = write(tmp_path / "p.jsonl", {"prompt": said, "answer": 3}, {"prompt": "Yes?"})
    chat, text = read_prompts(file, source, 256, also=("answer",))
    assert chat.tokens == tokenizer.chat(said) and chat.also == {"answer": 3}
    assert text.tokens == tokenizer.encode("Yes?")
    assert json.loads(_text(source, chat)) == said and _text(source, text) == "Yes?"
    assert _messages(source, chat) == [said[0], {**said[1], "weight": 0}, said[2]]
    assert _messages(source, text) == [{"role": "user", "content": "Yes?"}]
    for bad, problem in (
        ([], "an empty list"),
        ([1], "a message is an object"),
        ([{"role": "user"}], "p.jsonl:1"),
    ):
        with pytest.raises(RefusedArgument, match=problem):
            read_prompts(write(tmp_path / "p.jsonl", {"prompt": bad}), source, 256)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--filter", "reward>high"], "--filter 'reward>high'"),
        (["--filter", "format>0"], "no 'format' there; it can be reward, or of answer"),
        (["--reward", "anwser"], "did you mean 'answer'"),
        (["--samples", "0"], "--samples 0"),
        (["--temperature", "0"], "--temperature 0 with --samples 3"),
        (["--reward-timeout", "0"], "--reward-timeout 0: must be above 0"),
        (["--reward-workers", "0"], "--reward-workers 0: must be 1 or more"),
    ],
)
def test_wrong_words_are_refused_in_a_line(hf, questions, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        main(words(hf, questions, tmp_path / "out.jsonl", *more))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_samples_that_would_be_the_same_are_refused_before_the_model_is_read(tmp_path, capsys):
    words = ["--load", "nowhere", "--prompts", "nowhere", "--output", str(tmp_path / "kept.jsonl")]
    with pytest.raises(SystemExit):
        main([*words, "--samples", "2", "--temperature", "0"])
    assert capsys.readouterr().err.startswith("error: --temperature 0 with --samples 2")


def test_filters():
    keep = read_filter(" format >= 0.2", ["answer", "format"])
    assert keep(0, {"answer": 0, "format": 0.2}) and not keep(9, {"answer": 9, "format": 0.1})
    assert read_filter("reward!=1e-1", ["answer"])(0.2, {}) and not read_filter("reward==0.1", [])(0.2, {})
