"""What a shell compares and edits: strings, patterns, numbers."""

import fnmatch
import re

__all__ = ["as_list", "compare", "edited", "matches", "unquoted"]


def as_list(value: str | list[str]) -> list[str]:
    """An array; a single word is one of length 1."""
    return list(value) if isinstance(value, list) else [value] if value else []


def unquoted(text: str) -> str:
    """Without the quotes around the whole."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


def compare(a: str, sign: str, b: str) -> bool | None:
    """`a sign b` inside brackets; None for another sign, or no numbers where these are needed."""
    if sign in ("=", "=="):
        return matches(a, b)
    if sign == "!=":
        return not matches(a, b)
    if sign == "=~":
        try:
            return re.search(b, a) is not None
        except re.error:
            return None
    numbers = {"-eq": "==", "-ne": "!=", "-lt": "<", "-le": "<=", "-gt": ">", "-ge": ">="}
    if sign in numbers and re.fullmatch(r"-?\d+", a) and re.fullmatch(r"-?\d+", b):
        x, y = int(a), int(b)
        return {"==": x == y, "!=": x != y, "<": x < y, "<=": x <= y, ">": x > y, ">=": x >= y}[numbers[sign]]
    if sign in ("<", ">"):
        return a < b if sign == "<" else a > b
    return None


def matches(value: str, pattern: str) -> bool:
    """Whether a pattern of file names describes a value."""
    return value == pattern or fnmatch.fnmatchcase(value, pattern)


def edited(value: str, sign: str, pattern: str) -> str:
    """`${X%pattern}`, `${X#pattern}`, `${X/a/b}`, `${X:offset:length}`, `${X,,}`, `${X^^}`."""
    if sign in (",,", "^^"):
        return value.lower() if sign == ",," else value.upper()
    if sign == ":":
        offset, _, length = pattern.partition(":")
        try:
            begin = int(offset)
            return value[begin : begin + int(length)] if length else value[begin:]
        except ValueError:
            return value
    if sign in ("/", "//"):
        old, _, new = pattern.partition("/")
        found = re.compile(fnmatch.translate(old).removesuffix("\\Z"))
        return found.sub(lambda match: new, value, count=0 if sign == "//" else 1) if old else value
    cuts = range(len(value) + 1)
    if sign in ("#", "##"):
        order = cuts if sign == "#" else reversed(cuts)
        return next((value[i:] for i in order if fnmatch.fnmatchcase(value[:i], pattern)), value)
    order = reversed(cuts) if sign == "%" else cuts
    return next((value[:i] for i in order if fnmatch.fnmatchcase(value[i:], pattern)), value)
