"""Text of growing tokens: nothing shown is taken back, stop strings anywhere in tokens, unfinished characters held."""

import random

import pytest

from dsv3_megatron.inference.text import TextStream


def decode_bytes(ids):
    """A token is one or more bytes."""
    return b"".join(TOKENS[i] for i in ids).decode("utf-8", errors="replace")


TOKENS = [
    b"a",
    b"b",
    b"ab",
    b"ba\n",
    b"\n",
    "é".encode()[:1],
    "é".encode()[1:],
    "三".encode(),
    b"stop",
    b"st",
    b"op!",
]


@pytest.mark.parametrize("seed", range(30))
def test_shown_text_is_that_of_all_tokens(seed):
    rng = random.Random(seed)
    tokens = []
    for _ in range(rng.randrange(1, 25)):
        token = rng.randrange(len(TOKENS))
        if token == 6 or (tokens and tokens[-1] == 5 and token != 6):
            token = 6 if tokens and tokens[-1] == 5 else 0  # halves of the character in their order
        tokens.append(token)
    stream = TextStream(decode_bytes)
    shown = "".join(stream.push([token]) for token in tokens) + stream.finish()
    assert shown == stream.text == decode_bytes(tokens)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("stop", ["a", "stop", "b\n", "bab", "p!"])
def test_text_ends_before_the_first_stop_string(seed, stop):
    rng = random.Random(seed)
    tokens = [rng.choice([0, 1, 2, 3, 4, 8, 9, 10]) for _ in range(25)]
    stream = TextStream(decode_bytes, [stop, "never"])
    used, shown = [], ""
    for token in tokens:
        if stream.stopped:
            break
        used.append(token)
        shown += stream.push([token])
        assert stop not in shown
    shown += stream.finish()
    whole = decode_bytes(tokens)
    assert shown == (whole[: whole.index(stop)] if stop in whole else whole)
    if stop in whole:
        assert stop in decode_bytes(used) and stop not in decode_bytes(
            used[:-1]
        )  # with the token that completes it


def test_unfinished_characters_wait():
    stream = TextStream(decode_bytes)
    assert [stream.push([5]), stream.push([6])] == ["", "é"]
    assert stream.push([5]) == "" and stream.finish() == "\ufffd"


def test_a_beginning_of_a_stop_string_waits():
    stream = TextStream(decode_bytes, ["stop"])
    assert stream.push([0, 9]) == "a"  # "st" may become "stop"
    assert stream.push([0]) == "sta" and not stream.stopped


def test_tokens_after_the_stop_string_are_an_error():
    stream = TextStream(decode_bytes, ["a"])
    with pytest.raises(ValueError, match="after the stop string"):
        stream.push([0, 0])


def test_decoders_that_look_at_neighbours():
    """As SentencePiece's do: a leading space is dropped at the beginning only."""
    pieces = ["▁the", "▁cat", "s", "▁sat"]
    stream = TextStream(lambda ids: "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert "".join(stream.push([i]) for i in [0, 1, 2, 3, 0, 1, 2, 0, 3]) == "the cats sat the cats the sat"
