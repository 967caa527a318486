"""What the harness calls for our tasks; it loads this file by its path."""

from functools import partial
from typing import Any

from dsv3_megatron.evaluation.code import humaneval_problems, passed
from dsv3_megatron.evaluation.documents import choices, questions, text_files, written
from dsv3_megatron.evaluation.grading import (
    CORRECT,
    INCORRECT,
    NOT_ATTEMPTED,
    calibration_error,
    correct_given_attempted,
    f_score,
    most_frequent,
    parted,
)
from dsv3_megatron.evaluation.needle import documents
from dsv3_megatron.evaluation.setting import current

__all__ = ["calibration_error", "correct_given_attempted", "f_score"]

Splits = dict[str, Any]


def _test(rows: list[dict[str, Any]]) -> Splits:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def texts(**unused: Any) -> Splits:
    return _test(text_files(current().texts) or [*written("en"), *written("zh")])


def _of_language(read: Any, language: str, **unused: Any) -> Splits:
    return _test(read(language))


texts_en, texts_zh = partial(_of_language, written, "en"), partial(_of_language, written, "zh")
choices_en, choices_zh = partial(_of_language, choices, "en"), partial(_of_language, choices, "zh")
facts_en, facts_zh = partial(_of_language, questions, "en"), partial(_of_language, questions, "zh")


def haystacks(**unused: Any) -> Splits:
    setting = current()
    return _test(documents(setting.needle_lengths, setting.needle_depths, setting.max_length, setting.count))


def humaneval(**unused: Any) -> Splits:
    return _test(humaneval_problems())


def found(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"found": float(doc["number"] in results[0])}


def passes(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"pass@1": float(passed(doc, results[0]))}


def graded(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    return _figures(doc, *parted(results[0]))


def graded_by_frequency(doc: dict[str, Any], results: list[list[str]]) -> dict[str, Any]:
    return _figures(doc, *most_frequent([parted(reply)[0] for reply in results[0]]))


def _figures(doc: dict[str, Any], answer: str, confidence: float | None) -> dict[str, Any]:
    grade = current().grader(doc["question"], answer, doc["answers"])
    correct, attempted = float(grade == CORRECT), float(grade != NOT_ATTEMPTED)
    return {
        "correct": correct,
        "incorrect": float(grade == INCORRECT),
        "not_attempted": 1 - attempted,
        "correct_given_attempted": (correct, attempted),
        "f_score": (correct, attempted),
        "calibration_error": (confidence, correct),
    }
