"""Rewards that raise, hang, lie or die: a value and an outcome for each sample, and the run goes on."""

import logging
import math
import os
import sys
import time

import pytest

from dsv3_megatron import rewards
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.rewards.named import parts_of


class NoText(Exception):
    def __str__(self):
        raise RuntimeError("an error without a text")


class NoNumber:
    def __float__(self):
        raise RuntimeError("as a tensor of two elements")


def troubled(prompt, response, answer):
    """A reward that does what the response says."""
    if response == "raise":
        raise KeyError("broken\nreward")
    if response == "no text":
        raise NoText
    if response == "half":
        raise ValueError("\ud800")
    if response == "interrupt":
        raise KeyboardInterrupt
    if response == "no number":
        return NoNumber()
    if response == "exit":
        sys.exit(3)
    if response == "nan":
        return math.nan
    if response == "infinite":
        return -math.inf
    if response == "text":
        return "high"
    if response == "nothing":
        return None
    if response == "hang":
        time.sleep(99)
    if response == "die":
        os.kill(os.getpid(), 9)
    if response == "leave":
        os._exit(0)
    if response == "print":
        print("ready\n{}")
    return answer


HERE = f"{__name__}:troubled"
EXPECTED = {
    "raise": "raised", "no text": "raised", "half": "raised", "no number": "not a number", "interrupt": "killed",
    "exit": "raised", "nan": "not finite", "infinite": "not finite", "text": "not a number",
    "nothing": "not a number", "hang": "timeout", "die": "killed", "leave": "killed", "print": "ok", "": "ok",
}  # fmt: skip


def test_every_failure_has_an_outcome_and_costs_its_sample_only(caplog, monkeypatch):
    # Whatever other tests of this process have configured.
    monkeypatch.setattr(logging.getLogger("dsv3_megatron.rewards.runner"), "disabled", False)
    caplog.set_level(logging.WARNING, logger="dsv3_megatron.rewards.runner")
    responses = [word for pair in zip(EXPECTED, ["fine"] * len(EXPECTED), strict=True) for word in pair]
    answers = [float(place) for place in range(len(responses))]
    with rewards.Scorer(HERE, workers=2, timeout_s=2.0, on_failure=-7.0) as scorer:
        scores = scorer.score([""] * len(responses), responses, answers)
        for response, answer, score in zip(responses, answers, scores, strict=True):
            assert score.outcome == EXPECTED.get(response, "ok"), (response, score)
            assert score.value == (answer if score.ok else -7.0)
            assert score.ok or (score.detail and "\n" not in score.detail)
            score.detail.encode()  # can be printed
            assert response != "leave" or score.detail.endswith("status 0")  # its own end, not our kill
        assert scorer.outcomes["ok"] == len(EXPECTED) + 2
        assert [one.value for one in scorer.score(["p"], ["again"], [5.0])] == [5.0]
    assert "13 of 30 rewards failed and count -7" in caplog.text


def test_in_this_process_without_isolation():
    words = ["raise", "no text", "exit", "nan", "text", "no number", "fine"]
    scores = rewards.score(troubled, [""] * 7, words, [1.0] * 7, isolate=False)
    assert [score.outcome for score in scores] == [EXPECTED.get(word, "ok") for word in words]
    assert [score.value for score in rewards.score(lambda p, r, a: 2, ["", ""], ["", ""], isolate=False)] == [
        2.0,
        2.0,
    ]


def test_parts_of_a_sum():
    scores = rewards.score("answer=2,format=0.5", ["q"], ["<think>so</think> <answer>1/2</answer>"], ["0.5"])
    assert scores == [rewards.Score(2.5, parts={"answer": 2.0, "format": 0.5})]
    assert rewards.resolve("answer=2,format=0.5")("q", "1/2", "0.5") == 2.0


@pytest.mark.parametrize(
    "name, message",
    [
        ("anwser", "did you mean 'answer'"),
        ("answer=high", "weight 'high' of 'answer' is not a finite number"),
        ("answer=nan", "not a finite number"),
        ("answer,answer", "stands twice"),
        ("", "no such reward"),
        ("no_such_module_here:f", "cannot import"),
        (f"{__name__}:missing", "has no 'missing'"),
        ("math:pi", "is no function"),
        ("os.path:basename", "cannot be called as reward"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_runs(name, message):
    with pytest.raises(RefusedArgument, match=message):
        rewards.Scorer(name)


def test_what_another_process_cannot_import_is_refused():
    with pytest.raises(RefusedArgument, match="isolate=False"):
        rewards.Scorer(lambda prompt, response, answer: 1.0)
    assert parts_of(troubled)[0].name == HERE
    assert parts_of(rewards.resolve("format"))[0].name == "format"


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"timeout_s": 0}, {"timeout_s": math.inf}, {"on_failure": math.nan}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(RefusedArgument, match=next(iter(options))):
        rewards.Scorer("answer", **options)


def test_lists_that_do_not_fit_are_refused():
    with rewards.Scorer("answer") as scorer:
        with pytest.raises(RefusedArgument, match="equally many"):
            scorer.score(["a"], ["a", "b"], ["c"])
        with pytest.raises(RefusedArgument, match="sample 0: prompt, response and answer must be JSON"):
            scorer.score(["a"], ["a"], [object()])
        assert scorer.score([], []) == []
