"""Text that is asked with, and of a growing sequence of tokens as it may be shown, up to a stop string. Pure logic."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["TextStream", "json_value"]

INCOMPLETE = "\ufffd"  # what bytes of an unfinished character decode to


class TextStream:
    """Decodes token by token; holds back what may still change.

    That is an unfinished character, and text that may be the beginning of a stop string. A stop string may begin and
    end inside tokens, and span several.

    Args:
        decode: token ids to text.
        stop: strings before which the text ends.

    Attributes:
        text: all that was shown.
        stopped: a stop string came.
    """

    # Tokens before the new ones that are decoded with them: some tokenizers decode by neighbours (a leading space).
    CONTEXT = 4

    def __init__(self, decode: Callable[[list[int]], str], stop: Iterable[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._context: list[int] = []
        self._unfinished: list[int] = []
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """Append tokens; the text to show now. Stop after the token that makes `stopped` true."""
        shown = ""
        for token in tokens:
            if self.stopped:
                raise ValueError("tokens after the stop string")
            shown += self._push(token)
        return shown

    def _push(self, token: int) -> str:
        self._unfinished.append(token)
        new = self._new_text()
        if new.endswith(INCOMPLETE):
            return ""
        self._context = (self._context + self._unfinished)[-self.CONTEXT :]
        self._unfinished = []
        return self._show(new)

    def _new_text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._unfinished)[len(before) :]

    def _show(self, new: str) -> str:
        waiting = self._held + new
        ends = [at for stop in self._stop if (at := waiting.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._shown(waiting[: min(ends)], "")
        keep = max((_beginning(waiting, stop) for stop in self._stop), default=0)
        return self._shown(waiting[: len(waiting) - keep], waiting[len(waiting) - keep :])

    def _shown(self, text: str, held: str) -> str:
        self.text += text
        self._held = held
        return text

    def finish(self) -> str:
        """What was held back, at the end of the tokens; nothing after a stop string."""
        if self.stopped:
            return ""
        rest = self._new_text() if self._unfinished else ""
        self._unfinished = []
        shown = self._show(rest) if rest else ""
        if self.stopped:
            return shown
        return shown + self._shown(self._held, "")


def _beginning(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def json_value(data: str | bytes) -> Any:
    """What a request or a line of prompts holds.

    Raises:
        ValueError: it is not JSON, nested without end, or holds half of a surrogate pair, which is no text.
    """
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError(str(error)) from error
    return value
