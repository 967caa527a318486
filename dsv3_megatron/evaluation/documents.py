"""The small Chinese and English sets that come with this package, and texts from files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument

__all__ = ["choices", "questions", "text_files", "written"]

FOLDER = Path(__file__).parent / "tasks"


def _read(name: str, language: str) -> list[dict[str, Any]]:
    lines = (FOLDER / name).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return [row for row in rows if row["language"] == language]


def written(language: str) -> list[dict[str, Any]]:
    """Six short texts: `{"language", "text"}`."""
    return _read("texts.jsonl", language)


def choices(language: str) -> list[dict[str, Any]]:
    """24 beginnings with four endings: `{"language", "question", "choices", "answer"}`."""
    return _read("choices.jsonl", language)


def questions(language: str) -> list[dict[str, Any]]:
    """20 questions of fact with every spelling of the answer: `{"language", "question", "answers"}`."""
    return _read("facts.jsonl", language)


def text_files(files: Sequence[Path]) -> list[dict[str, Any]]:
    """A document of each file: `{"language", "text"}`.

    Raises:
        RefusedArgument: a file cannot be read, or holds no text.
    """
    found = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise RefusedArgument(f"--text {file}: {reason}") from error
        if not text.strip():
            raise RefusedArgument(f"--text {file}: holds no text")
        found.append({"language": "", "text": text})
    return found
