"""Random splitting of tokens that join punctuation and line breaks (report §4.1).

Such tokens (`).⏎⏎` as one) bias a model whose prompt ends without the line break; so DeepSeek splits "a certain
proportion" of them in training. The share is unpublished. Here each one is split, between punctuation and line breaks,
with the same probability; which ones depends only on the document and a seed.
"""

import random
import unicodedata
from collections.abc import Callable, Mapping, Sequence


def merged_tokens(texts: Mapping[int, str], encode: Callable[[str], list[int]]) -> dict[int, list[int]]:
    """Ids that join punctuation and line breaks, with the ids of the two parts.

    Args:
        texts: id to what it decodes to.
        encode: text to ids, without special tokens.
    """
    parts = {}
    for token, text in texts.items():
        if "\ufffd" in text:  # half a character, which its parts would not give back
            continue
        punctuation = text.rstrip("\r\n")
        breaks = text[len(punctuation) :]
        marks = punctuation.removeprefix(" ")
        if breaks and marks and all(unicodedata.category(mark)[0] in "PS" for mark in marks):
            parts[token] = [*encode(punctuation), *encode(breaks)]
    return parts


def split_at_random(
    ids: Sequence[int], parts: Mapping[int, Sequence[int]], rate: float, rng: random.Random
) -> list[int]:
    """`ids` with each id of `parts` replaced by its parts with probability `rate`; the text stays the same."""
    result: list[int] = []
    for token in ids:
        if token in parts and rng.random() < rate:
            result += parts[token]
        else:
            result.append(token)
    return result
