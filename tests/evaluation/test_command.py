"""`dsv3 evaluate`: what it refuses, how it goes on, odd input."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.evaluation.answers import Answers
from dsv3_megatron.evaluation.documents import written
from dsv3_megatron.evaluation.model import HarnessModel
from dsv3_megatron.evaluation.scorer import Request, Row, Score
from dsv3_megatron.evaluation.text import open_tokenizer
from dsv3_megatron.serve.evaluate import main
from tests.convert.releases import micro, release

TASK = ("--tasks", "dsv3_choice_en")


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line, with status 2."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in argv])
    captured = capsys.readouterr()
    *_, line = captured.err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and "Traceback" not in captured.err
    assert captured.out == ""
    return line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--tasks: names no task"),
        (("--tasks", "dsv3_needel"), "--tasks dsv3_needel: no such task; did you mean dsv3_needle?"),
        (("--tasks", "dsv3_text,arc_esy"), "--tasks arc_esy: no such task; did you mean arc_easy?"),
        (("--tasks",), "argument --tasks: expected at least one argument"),
        ((*TASK, "--limit", "x"), "argument --limit: invalid int value: 'x'"),
        ((*TASK, "--output", __file__), "test_command.py: is a file; name a folder"),
        (
            (*TASK, "--num-fewshot", "500"),
            "--num-fewshot 500: one of dsv3_choice_en has not as many examples",
        ),
        ((*TASK, "--load", "x"), "give --load DIR (a Megatron checkpoint) or --hf DIR"),
        ((*TASK, "--limit", "0"), "--limit 0: must be 1 or more"),
        ((*TASK, "--num-fewshot", "-1"), "--num-fewshot -1: must be 0 or more"),
        ((*TASK, "--speculative", "mtp"), "--speculative mtp"),
        ((*TASK, "--grader", "gpt"), "--grader gpt: match, or the URL"),
        ((*TASK, "--grader", "http://[", "--grader-model", "x"), "--grader http://[: match, or the URL"),
        ((*TASK, "--grader", "http://a b/v1", "--grader-model", "x"), "--grader http://a b/v1: match, or"),
        ((*TASK, "--grader", "http://x/v1", "--grader-model", ""), "belong together: give both, or neither"),
        ((*TASK, "--max-length", "0"), "--max-length 0: from 2 to"),
        ((*TASK, "--grader", "http://x/v1"), "--grader URL and --grader-model NAME belong together"),
        ((*TASK, "--grader-model", "x"), "--grader URL and --grader-model NAME belong together"),
        ((*TASK, "--include-path", "nowhere"), "--include-path nowhere: no such folder"),
        ((*TASK, "--max-length", "9999"), "--max-length 9999"),
        (("--tasks", "arc_easy"), "--tasks arc_easy: its data (allenai/ai2_arc) is not on this machine"),
        (("--tasks", "dsv3_needle", "--needle-lengths", "4096"), "--needle-lengths 4096: the context of 256"),
        ((*TASK, "--needle-lengths", "64"), "--needle-lengths: none of --tasks reads it; add dsv3_needle"),
        ((*TASK, "--grader", "http://x/v1", "--grader-model", "x"), "--grader: none of --tasks reads it"),
        (("--tasks", "dsv3_text_en", "--text", "x"), "--text: none of --tasks reads it; add dsv3_text"),
        (("--tasks", "dsv3_text", "--text", "nowhere.txt"), "--text nowhere.txt: No such file"),
    ],
)
def test_wrong_words_are_named(words, named, hf, capsys):
    assert named in refused(capsys, "--hf", hf, "--device", "cpu", *words)


def test_wrong_models_are_named(hf, tmp_path, capsys):
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    assert "config.json" in refused(capsys, "--hf", empty, "--device", "cpu", *TASK)
    assert str(empty) in refused(capsys, "--load", empty, "--device", "cpu", *TASK)
    assert "no such folder" in refused(capsys, "--load", tmp_path / "nowhere", "--device", "cpu", *TASK)
    assert "give --load DIR" in refused(capsys, "--device", "cpu", *TASK)
    release(tmp_path / "small", micro())
    words = ("--hf", tmp_path / "small", "--tokenizer", hf, "--device", "cpu", *TASK)
    assert "has ids up to 399, the vocabulary" in refused(capsys, *words)
    (tmp_path / "tracker").mkdir()
    (tmp_path / "tracker" / "latest_checkpointed_iteration.txt").write_text("abc")
    assert "'abc' is neither an iteration nor release" in refused(
        capsys, "--load", tmp_path / "tracker", "--device", "cpu", *TASK
    )
    shutil.copytree(hf, bare)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    assert config.pop("chat_template")
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    words = ("--hf", bare, "--device", "cpu", *TASK, "--apply-chat-template")
    assert "--apply-chat-template: the tokenizer of" in refused(capsys, *words)
    (bare / "tokenizer.json").unlink()
    assert "dsv3 evaluate needs a tokenizer" in refused(capsys, "--hf", bare, "--device", "cpu", *TASK)
    (bare / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused(capsys, "--hf", bare, "--device", "cpu", *TASK)


# --- the model over a leader that is no model: token n + 1 follows token n


class Counts:
    """Scores −1 a token; goes on with what was given, backwards."""

    max_length, num_at_once, samples = 16, 4, True

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def score(self, rows: Any) -> list[Score]:
        self.asked += rows
        return [Score(-float(row.num_scored), True) for row in rows]

    def generate(self, requests: Any) -> list[list[int]]:
        self.asked += requests
        return [list(request.tokens[::-1][: request.max_new_tokens]) for request in requests]


@pytest.fixture
def asked(hf) -> tuple[HarnessModel, Counts]:
    leader = Counts()
    return HarnessModel(open_tokenizer(hf), leader, report=lambda line: None), leader  # type: ignore[arg-type]


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args, task_name="t", doc_id=3)


def test_rows_are_cut_to_the_context_and_each_token_is_scored_once(asked):
    model, leader = asked
    text = written("en")[0]["text"][:250]
    tokens = model.tok_encode(text)
    assert len(tokens) > 3 * model.max_length
    assert model.loglikelihood_rolling([request(text), request("")]) == [-float(len(tokens)), 0.0]
    assert all(len(row.tokens) <= model.max_length + 1 for row in leader.asked)
    assert sum(row.num_scored for row in leader.asked) == len(tokens)
    leader.asked.clear()
    ending = " at four"
    (score,) = model.loglikelihood([request(text, ending)])
    (row,) = leader.asked
    assert len(row.tokens) == model.max_length + 1 and score == (-float(row.num_scored), True)
    assert model.tokenizer.decode(row.tokens[-row.num_scored :]) == ending


def test_odd_input_is_named(asked):
    model, leader = asked
    for bad, said in (
        (lambda: model.loglikelihood([request("x", "")]), "task t, document 3: an empty continuation"),
        (lambda: model.loglikelihood([request("x", " word" * 200)]), "--max-length 16: a continuation has"),
        (lambda: model.generate_until([request("x", {"until": [], "num_beams": 4})]), "ask for num_beams"),
        (lambda: model.generate_until([request("x", {"max_gen_toks": 16})]), "leaves no room for a prompt"),
    ):
        with pytest.raises(RefusedArgument, match=said):
            bad()
    assert leader.asked == []
    (answer,) = model.generate_until([request("", {"until": [], "max_gen_toks": 4})])
    assert answer == "" and leader.asked[0].tokens == (model.prefix_token_id,)


def test_what_was_answered_is_not_asked_again_and_repeats_are_drawn_anew(asked):
    model, leader = asked
    same = [request("a town", " wakes"), request("a town", " wakes"), request("a town", " sleeps")]
    assert model.loglikelihood(same)[0] == model.loglikelihood(same)[1]
    assert len(leader.asked) == 2
    leader.asked.clear()
    how = {"until": ["x"], "do_sample": True, "temperature": 0.7, "max_gen_toks": 2}
    model.generate_until([request("a town", how)] * 3)
    assert sorted(question.number for question in leader.asked) == [0, 1, 2]
    leader.asked.clear()
    model.generate_until([request("a town", {"until": ["x"], "max_gen_toks": 2})] * 3)
    assert len(leader.asked) == 1


QUESTIONS = [Row((1, 2, 3), 2), Request((1, 2), 5, ("x",)), Request((1, 2), 5, ("x",), number=1)]
ANSWERS: list[Any] = [Score(-1.5, True), [3, 4], []]


def test_answers_are_kept_and_a_cut_line_is_written_again(tmp_path):
    answers = Answers(tmp_path, {"model": "a"})
    answers.add(zip(QUESTIONS, ANSWERS, strict=True))
    answers.close()
    file = tmp_path / "answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    again = Answers(tmp_path, {"model": "a"})
    assert [question in again for question in QUESTIONS] == [True, True, False]
    assert [again[question] for question in QUESTIONS[:2]] == ANSWERS[:2]
    again.add([(QUESTIONS[2], ANSWERS[2])])
    again.close()
    assert file.read_bytes() == whole
    with pytest.raises(RefusedArgument, match="model 'a' there, 'b' asked"):
        Answers(tmp_path, {"model": "b"})
    with pytest.raises(RefusedArgument, match=r"is there and holds no evaluation \(x\); name another"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "x").write_text("")
        Answers(tmp_path / "other", {"model": "a"})
    file.write_text("nonsense\n")
    with pytest.raises(RefusedArgument, match=r"answers\.jsonl:1: was not written by this command"):
        Answers(tmp_path, {"model": "a"})


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_to_the_same_results(hf, tmp_path, capsys):
    argv = ["--hf", str(hf), "--device", "cpu", "--tasks", "dsv3_choice_en", "--limit", "5", "--json"]

    def run(folder: Path) -> tuple[dict[str, Any], str]:
        assert main([*argv, "--output", str(folder)]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1]), captured.err

    whole, said = run(tmp_path / "whole")
    assert "evaluate score 20 of 20" in said
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    file = tmp_path / "cut" / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:13]) + lines[13][:20])
    again, said = run(tmp_path / "cut")
    assert again == whole and "evaluate score 7 of 7" in said
    again, said = run(tmp_path / "cut")
    assert again == whole and "evaluate score" not in said


def test_answers_are_graded_by_an_endpoint(hf, endpoint, monkeypatch, capsys):
    url, seen = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    words = ["--hf", str(hf), "--device", "cpu", "--tasks", "dsv3_facts_en", "--limit", "2", "--json"]
    assert main([*words, "--bootstrap-iters", "0", "--grader", url, "--grader-model", "judge"]) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out.splitlines()[-1])["results"]["dsv3_facts_en"]
    # A model that has learned nothing answers nonsense; this grader calls it right.
    assert len(seen) == 2 and seen[0]["model"] == "judge" and seen[0]["key"] == "Bearer secret"
    assert figures["correct,none"] == figures["f_score,none"] == 1.0
    assert "secret" not in captured.out + captured.err


PRINTS = """
task: prints
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{q}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: bleu}]
"""


def test_with_json_nothing_else_is_on_stdout(hf, tmp_path, capfd):
    """The harness prints that it draws standard errors; the processes that it ends afterwards print no stacks."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"q": "a town"}\n{"q": "a mill"}\n')
    (tmp_path / "prints.yaml").write_text(PRINTS.replace("QUESTIONS", str(questions)))
    words = ["--hf", str(hf), "--device", "cpu", "--include-path", str(tmp_path), "--tasks", "prints"]
    assert main([*words, "--bootstrap-iters", "1000", "--limit", "1" + 20 * "0", "--json"]) == 0
    captured = capfd.readouterr()
    (line,) = captured.out.splitlines()
    assert "bleu,none" in json.loads(line)["results"]["prints"]
    assert "bootstrapping" in captured.err and "Stack (most recent call first)" not in captured.err
    questions.unlink()
    assert f"--tasks prints: {questions}: no such file" in refused(capfd, *words)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(hf, tmp_path, capsys):
    """SIGKILL in the middle of the scores: the same command computes the others alone."""
    argv = ["--hf", str(hf), "--device", "cpu", "--tasks", "dsv3_choice_en", "--max-batch", "1", "--json"]
    argv += ["--bootstrap-iters", "0", "--output", str(tmp_path / "cut")]
    answers = tmp_path / "cut" / "answers.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "dsv3_megatron", "evaluate", *argv])
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (answers.exists() and answers.read_bytes().count(b"\n") >= 8):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    done = answers.read_bytes().count(b"\n")
    assert 8 <= done < 96 and not (tmp_path / "cut" / "results.json").exists()
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert f"evaluate score {96 - done} of {96 - done}" in captured.err
    assert main([*argv[:-1], str(tmp_path / "whole")]) == 0
    assert capsys.readouterr().out == captured.out
