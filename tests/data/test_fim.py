"""FIM: the PSM format of the report on token level, its rate, and what it depends on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.documents import document_id
from dsv3_megatron.data.fim import document_tokens, fim_cuts

# One id per character, and ids for the special tokens that no character has.
SPECIAL_IDS = {"<|fim_begin|>": -1, "<|fim_hole|>": -2, "<|fim_end|>": -3, "<|eos_token|>": -4}


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_psm_order_on_tokens():
    tokens = document_tokens("abcdefg", (2, 5), encode, SPECIAL_IDS)
    # <|fim_begin|>prefix<|fim_hole|>suffix<|fim_end|>middle<|eos_token|>, written out (report §4.1)
    assert tokens == [-1, *encode("ab"), -2, *encode("fg"), -3, *encode("cde"), -4]


def test_plain_document_ends_with_eos():
    assert document_tokens("abc", None, encode, SPECIAL_IDS) == [*encode("abc"), -4]


@given(st.text(min_size=0, max_size=40), st.integers(0, 2**32))
def test_no_text_is_lost(text, seed):
    cuts = fim_cuts(text, document_id(text), rate=1.0, seed=seed)
    assert cuts is not None
    tokens = document_tokens(text, cuts, encode, SPECIAL_IDS)
    assert tokens[0] == -1
    hole, end = tokens.index(-2), tokens.index(-3)
    prefix, suffix, middle = tokens[1:hole], tokens[hole + 1 : end], tokens[end + 1 : -1]
    assert prefix + middle + suffix == encode(text)
    assert tokens[-1] == -4 and len(tokens) == len(text) + 4


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_rate(rate):
    num = 4000
    chosen = sum(fim_cuts("x" * 20, document_id(str(i)), rate, seed=7) is not None for i in range(num))
    # five standard deviations of a binomial
    assert abs(chosen - num * rate) <= 5 * (num * rate * (1 - rate)) ** 0.5


def test_cuts_are_uniform_over_character_boundaries():
    length, num = 4, 20000
    seen: dict[tuple[int, int], int] = {}
    for i in range(num):
        cuts = fim_cuts("x" * length, document_id(str(i)), 1.0, seed=3)
        assert cuts is not None
        seen[cuts] = seen.get(cuts, 0) + 1
    for a in range(length + 1):
        for b in range(a, length + 1):
            share = (1 if a == b else 2) / (length + 1) ** 2
            assert abs(seen[a, b] - num * share) <= 5 * (num * share) ** 0.5, (a, b)


def test_depends_on_document_and_seed_only():
    ids = [document_id(str(i)) for i in range(300)]
    text = "some text to be cut"
    first = [fim_cuts(text, doc_id, 0.5, seed=1) for doc_id in ids]
    backwards = [fim_cuts(text, doc_id, 0.5, seed=1) for doc_id in reversed(ids)]
    assert first == backwards[::-1]
    assert first != [fim_cuts(text, doc_id, 0.5, seed=2) for doc_id in ids]
    # A higher rate keeps every choice of a lower one.
    higher = [fim_cuts(text, doc_id, 0.8, seed=1) for doc_id in ids]
    assert all(low is None or low == high for low, high in zip(first, higher, strict=True))
