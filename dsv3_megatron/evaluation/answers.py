"""What a model has answered so far, by question: an evaluation that was interrupted goes on from it."""

import json
import os
from collections.abc import Iterable
from dataclasses import astuple
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.evaluation.scorer import Request, Row, Score
from dsv3_megatron.files import write_whole

__all__ = ["Answers"]

FILE, SETTINGS = "answers.jsonl", "settings.json"

Question = Row | Request
Answer = Score | list[int]


class Answers:
    """Answers by question, in memory and, with a folder, in a file that every new answer is added to.

    Args:
        folder: None for memory alone.
        settings: what the answers depend on besides the question, JSON values; with others the folder is refused.

    Raises:
        RefusedArgument: the folder holds another evaluation, or cannot be written.
    """

    def __init__(self, folder: Path | None = None, settings: dict[str, Any] | None = None):
        self._found: dict[str, Answer] = {}
        self._file = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_settings(folder / SETTINGS, settings or {})
            self._read(folder / FILE)
            self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise RefusedArgument(f"--output {folder}: {error.strerror}") from error

    def __contains__(self, question: Question) -> bool:
        return _key(question) in self._found

    def __getitem__(self, question: Question) -> Any:
        return self._found[_key(question)]

    def add(self, answers: Iterable[tuple[Question, Answer]]) -> None:
        """Remember answers, on disk before this returns."""
        for question, answer in answers:
            key = _key(question)
            self._found[key] = answer
            if self._file is not None:
                value = list(astuple(answer)) if isinstance(answer, Score) else answer
                kind = "score" if isinstance(answer, Score) else "tokens"
                self._file.write(json.dumps({"key": key, kind: value}) + "\n")
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """After the last answer, or where the evaluation is interrupted."""
        if self._file is not None:
            self._file.close()

    def _read(self, file: Path) -> None:
        """Complete lines; what was cut short is cut off."""
        if not file.exists():
            return
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._found[entry["key"]] = Score(*entry["score"]) if "score" in entry else entry["tokens"]
            except (ValueError, KeyError, TypeError):
                raise RefusedArgument(
                    f"{file}:{number}: was not written by this command; remove the file, or name another --output"
                ) from None
        if len(whole) < len(content):
            with open(file, "r+b") as handle:
                handle.truncate(len(whole))


def _key(question: Question) -> str:
    text = repr((type(question).__name__, astuple(question))).encode()
    return blake2b(text, digest_size=16).hexdigest()


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    if not file.exists():
        if others := [other.name for other in file.parent.iterdir() if other.name != file.name + ".part"]:
            raise RefusedArgument(
                f"--output {file.parent}: is there and holds no evaluation ({others[0]}); name another"
            )
        write_whole(file, json.dumps(settings, indent=2) + "\n")
        return
    try:
        there = json.loads(file.read_text())
        changes = [
            f"{name} {there.get(name)!r} there, {value!r} asked"
            for name, value in settings.items()
            if there.get(name) != value
        ]
    except (ValueError, AttributeError):
        changes = [f"{file.name} is none of an evaluation"]
    if changes:
        raise RefusedArgument(
            f"--output {file.parent}: belongs to another evaluation ({'; '.join(changes)}); name another"
        )
