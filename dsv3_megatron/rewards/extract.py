"""The final answer inside a response: R1's tags, `\\boxed{}`, or the last line."""

import re

__all__ = ["boxed_contents", "final_answer", "tagged", "without_thoughts"]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def without_thoughts(response: str) -> str:
    """What follows the last `</think>`; all of it where there is none. Thoughts that never end leave nothing."""
    if "</think>" in response:
        return response.rpartition("</think>")[2]
    return "" if "<think>" in response else response


def tagged(response: str) -> str | None:
    """Content of the last `<answer>…</answer>` after the thoughts, stripped."""
    found = _ANSWER.findall(without_thoughts(response))
    return found[-1].strip() if found else None


def boxed_contents(text: str) -> list[str]:
    """Contents of every `\\boxed{…}`, braces balanced, outermost only; one that is cut off is left out."""
    found: list[str] = []
    place = 0
    while match := _BOXED.search(text, place):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            if text[end] == "\\":
                end += 1  # \{ and \} are signs, not braces
            elif text[end] in "{}":
                depth += 1 if text[end] == "{" else -1
            end += 1
        if depth:
            return found
        found.append(text[match.end() : end - 1].strip())
        place = end
    return found


def final_answer(response: str) -> str | None:
    """The answer a response gives.

    In this order: the last `\\boxed{}` of the last `<answer>`; that `<answer>`; the last `\\boxed{}` after the
    thoughts; what the last line says after "answer is", "answer:" or "####" (GSM8K's mark), or the whole of
    that line.
    """
    answer = tagged(response)
    if answer is not None:
        return next(reversed(boxed_contents(answer)), answer)
    rest = without_thoughts(response)
    if boxed := boxed_contents(rest):
        return boxed[-1]
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    if not lines:
        return None
    marked = re.search(r"(?:answer\s+is|answer\s*:|####)\s*(.*)$", lines[-1], re.IGNORECASE)
    return (marked.group(1) if marked else lines[-1]).strip()
