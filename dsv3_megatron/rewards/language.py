"""R1's language consistency: does the response keep to the writing of the question?"""

import json
import re
import unicodedata
from typing import Any

__all__ = ["language"]

_TAG = re.compile(r"</?(?:think|answer)>")
_WORD = re.compile(r"[^\W\d_]+")
# Written without spaces between words: a character counts as a word.
_SINGLE = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI")


def language(prompt: str, response: str, answer: Any = None) -> float:
    """Share of the response's words whose letters are of the scripts that the prompt is written in (R1 §3.2 has the
    share of words in the target language; scripts tell English from Chinese, not from German).

    Tags of the format are no words. 1.0 where prompt or response has no letters. A prompt of messages (JSON) is what
    the messages say.
    """
    asked = {_script(letter) for letter in _said(prompt) if letter.isalpha()}
    words = _words(_TAG.sub(" ", response))
    if not asked or not words:
        return 1.0
    return sum(all(_script(letter) in asked for letter in word) for word in words) / len(words)


def _said(prompt: str) -> str:
    try:
        messages = json.loads(prompt)
        return " ".join(str(message["content"]) for message in messages)
    except (ValueError, TypeError, KeyError):
        return prompt


def _words(text: str) -> list[str]:
    found: list[str] = []
    for word in _WORD.findall(text):
        found += list(word) if _script(word[0]) in _SINGLE else [word]
    return found


def _script(letter: str) -> str:
    """LATIN, CYRILLIC, CJK, …: the first word of the character's name."""
    return unicodedata.name(letter, "?").partition(" ")[0].partition("-")[0]
