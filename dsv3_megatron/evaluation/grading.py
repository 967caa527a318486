"""Answers to questions of fact: correct, incorrect or not attempted.

The three grades, the F-score and the calibration, by stated confidence and by how often an answer is repeated, are
those of SimpleQA (Wei et al., "Measuring short-form factuality in large language models", 2024).
"""

import json
import re
import string
import unicodedata
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from http.client import HTTPException

from dsv3_megatron.errors import RefusedArgument

__all__ = [
    "CORRECT", "INCORRECT", "NOT_ATTEMPTED", "Grader", "by_endpoint", "by_match", "calibration", "calibration_error",
    "correct_given_attempted", "f_score", "most_frequent", "normalised", "parted",
]  # fmt: skip

CORRECT, INCORRECT, NOT_ATTEMPTED = "correct", "incorrect", "not_attempted"
Grader = Callable[[str, str, Sequence[str]], str]  # question, answer, right answers -> grade

BINS = 10  # of stated confidence
_DECLINES = (
    "i dont know", "i do not know", "dont know", "not sure", "im not sure", "i am not sure", "unknown", "cannot answer",
    "i cannot answer", "no answer", "na", "不知道", "我不知道", "不清楚", "我不清楚", "不确定", "无法回答",
    "我无法回答", "未知",
)  # fmt: skip
_FRAMES = ("the answer is ", "answer is ", "answer ", "it is ", "its ", "答案是", "答案")
_CONFIDENCE = re.compile(r"(?:confidence|把握|置信度)\D{0,12}?(\d+(?:\.\d+)?)\s*[%％]?", re.IGNORECASE)


def normalised(text: str) -> str:
    """Without case, punctuation, articles, the frame of a sentence, and what Unicode writes in two ways."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(
        "" if c in "'’`" else " " if c in string.punctuation or unicodedata.category(c).startswith("P") else c
        for c in text
    )
    text = " ".join(word for word in text.split() if word not in ("a", "an", "the"))
    for frame in _FRAMES:
        frame = frame.replace("the ", "")
        if text.startswith(frame):
            text = text[len(frame) :].strip()
    return text


def parted(reply: str) -> tuple[str, float | None]:
    """The answer in a reply, and the stated confidence in 0 … 1, None where there is none."""
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip()]
    confidence = None
    if found := _CONFIDENCE.search(reply):
        value = float(found[1])
        confidence = value / 100 if value <= 100 else None
    answers = [line for line in lines if not _CONFIDENCE.match(line.lstrip("(（[ "))]
    answer = answers[0] if answers else ""
    return _CONFIDENCE.split(answer)[0].strip(" ,;，；(（[|"), confidence


def most_frequent(answers: Sequence[str]) -> tuple[str, float]:
    """The answer that comes most often among repeated ones (the earliest of several), and its share of them."""
    counts = Counter(map(normalised, answers))
    form, count = counts.most_common(1)[0]
    return next(answer for answer in answers if normalised(answer) == form), count / len(answers)


def by_match(question: str, answer: str, right: Sequence[str]) -> str:
    """Grade without a model: the answer is one of the right ones, as written or normalised; nothing is guessed at."""
    if answer in right:
        return CORRECT
    given = normalised(answer)
    if not given or given in _DECLINES:
        return NOT_ATTEMPTED
    return CORRECT if given in {normalised(each) for each in right} else INCORRECT


PROMPT = """Grade an answer to a question of fact.

Question: {question}
Right answer: {right}
Answer to grade: {answer}

A: correct. It says what the right answer says, and nothing against it. Spelling, case, order and hedging do not matter.
B: incorrect. Some statement in it contradicts the right answer.
C: not attempted. It does not give the right answer, and contradicts nothing.

Reply with one letter: A, B or C."""


def by_endpoint(url: str, model: str, key: str | None = None, timeout_s: float = 60.0) -> Grader:
    """A grader that asks a chat model behind OpenAI's API.

    Args:
        url: up to and with /v1.
        key: sent as a bearer token.

    Raises:
        RefusedArgument (by the grader): the endpoint does not answer, or with none of the three letters.
    """
    grades = {"A": CORRECT, "B": INCORRECT, "C": NOT_ATTEMPTED}

    def grade(question: str, answer: str, right: Sequence[str]) -> str:
        if not answer.strip():
            return NOT_ATTEMPTED
        prompt = PROMPT.format(question=question, right=" / ".join(right), answer=answer)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 8,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(
            url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                text = json.load(reply)["choices"][0]["message"]["content"]
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            raise RefusedArgument(f"--grader {url}: does not answer as OpenAI's API ({error})") from error
        letter = re.search(r"\b([ABC])\b", text or "")
        if letter is None:
            raise RefusedArgument(f"--grader {url}: replied {text!r:.80} where one of A, B, C was asked for")
        return grades[letter[1]]

    return grade


# --- figures over a task; each takes one item per question


def correct_given_attempted(items: Sequence[tuple[float, float]]) -> float:
    """Share of correct answers among those attempted; items are (correct, attempted)."""
    correct, attempted = (sum(column) for column in zip(*items, strict=True))
    return correct / attempted if attempted else 0.0


def f_score(items: Sequence[tuple[float, float]]) -> float:
    """Harmonic mean of the share of correct answers among all and among those attempted."""
    overall, given = sum(correct for correct, _ in items) / len(items), correct_given_attempted(items)
    return 2 * overall * given / (overall + given) if overall + given else 0.0


def calibration(items: Sequence[tuple[float | None, float]]) -> list[dict[str, float]]:
    """Stated confidence against accuracy in ten bins: `{"from", "to", "num", "confidence", "accuracy"}` where there are
    any; items are (confidence or None, correct)."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for confidence, correct in items:
        if confidence is not None:
            bins[min(int(confidence * BINS), BINS - 1)].append((confidence, correct))
    return [
        {
            "from": place / BINS,
            "to": (place + 1) / BINS,
            "num": len(members),
            "confidence": sum(confidence for confidence, _ in members) / len(members),
            "accuracy": sum(correct for _, correct in members) / len(members),
        }
        for place, members in enumerate(bins)
        if members
    ]


def calibration_error(items: Sequence[tuple[float | None, float]]) -> float:
    """Mean distance of accuracy from stated confidence over the bins, weighted by their answers; NaN without any."""
    table = calibration(items)
    total = sum(row["num"] for row in table)
    if not total:
        return float("nan")
    return sum(row["num"] * abs(row["confidence"] - row["accuracy"]) for row in table) / total
