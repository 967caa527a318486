"""The output of `dsv3 generate`: a line per prompt, in their order, appended as they are done; the same job goes on."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.files import write_whole
from dsv3_megatron.serve.prompts import Prompt

__all__ = ["Answers"]


class Answers:
    """Appends answers to a JSONL file in the order of the prompts; what an earlier run wrote is kept.

    What makes answers comparable (model, sampling) stands beside the file, in FILE.settings.json: with other settings
    the file is refused. A line that was cut short is written again.

    Args:
        file: the output.
        prompts: of the job.
        settings: of the job, JSON values.

    Attributes:
        done: prompts answered in the file.
        num_tokens: tokens of these answers.

    Raises:
        RefusedArgument: the file belongs to another job, or cannot be written.
    """

    def __init__(self, file: Path, prompts: Sequence[Prompt], settings: dict[str, Any]):
        self.file, self._prompts = file, prompts
        self._waiting: dict[int, str] = {}
        self.num_tokens = 0
        try:
            self._check_settings(settings)
            self.done = self._read()
            self._handle = open(file, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            fix = "; make its folder first" if isinstance(error, FileNotFoundError) else ""
            raise RefusedArgument(f"--output {file}: {error.strerror}{fix}") from error

    def _check_settings(self, settings: dict[str, Any]) -> None:
        if self.file.exists() and not self.file.is_file():
            raise RefusedArgument(f"--output {self.file}: is no file to go on from; name one")
        path = self.file.with_name(self.file.name + ".settings.json")
        if not self.file.exists() or not self.file.stat().st_size:
            write_whole(path, json.dumps(settings, indent=2) + "\n")
            return
        try:
            there = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            raise RefusedArgument(
                f"--output {self.file}: exists, and was not written by this command; remove it, or name another"
            ) from None
        changes = [
            f"{key} {there.get(key)!r} there, {value!r} asked"
            for key, value in settings.items()
            if there.get(key) != value
        ]
        if changes:
            raise RefusedArgument(
                f"--output {self.file}: was begun with other settings ({'; '.join(changes)}); name another"
            )

    def _read(self) -> int:
        """Number of complete lines; cuts off the rest."""
        if not self.file.exists():
            return 0
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]  # not splitlines: a text may hold U+2028
        if len(lines) > len(self._prompts):
            raise RefusedArgument(
                f"--output {self.file}: has {len(lines)} answers to {len(self._prompts)} prompts; name another"
            )
        for number, (line, prompt) in enumerate(zip(lines, self._prompts, strict=False), 1):
            try:
                answer = json.loads(line)
                given, num_tokens = answer["prompt"], len(answer["tokens"])
            except (ValueError, TypeError, KeyError):
                raise RefusedArgument(
                    f"{self.file}:{number}: is no answer; remove the file, or name another"
                ) from None
            if given != prompt.given:
                raise RefusedArgument(
                    f"{self.file}:{number}: answers another prompt; remove the file, or name another"
                )
            self.num_tokens += num_tokens
        if len(whole) < len(content):
            with open(self.file, "r+b") as handle:
                handle.truncate(len(whole))
        return len(lines)

    def add(self, index: int, text: str | None, tokens: list[int]) -> None:
        """The answer to a prompt, in any order; written as soon as those before it are."""
        answer = {"prompt": self._prompts[index].given, "text": text, "tokens": tokens}
        self._waiting[index] = json.dumps(answer, ensure_ascii=False)
        self.num_tokens += len(tokens)
        try:
            while self.done in self._waiting:
                self._handle.write(self._waiting.pop(self.done) + "\n")
                self.done += 1
            self._handle.flush()
        except OSError as error:
            raise RefusedArgument(
                f"--output {self.file}: {error.strerror}; make room, and the same command goes on"
            ) from error

    def close(self) -> None:
        """After the last answer, or where the job is interrupted."""
        with suppress(OSError):  # what was not written `add` has told
            self._handle.close()
