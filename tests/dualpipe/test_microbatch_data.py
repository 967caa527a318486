"""Which chunk sees which microbatch, and when each is read."""

from collections.abc import Iterator

import torch

from dsv3_megatron.dualpipe import microbatch_data
from dsv3_megatron.dualpipe.microbatch_data import chunk_iterators


class Reader:
    """An iterator over batches that counts what was read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> dict:
        self.read += 1
        return {"tokens": torch.tensor([self.read])}


def tokens(iterator: Iterator, count: int) -> list[int]:
    return [int(next(iterator)["tokens"]) for _ in range(count)]


def test_nothing_is_read_before_it_is_needed() -> None:
    reader = Reader()
    first, second = chunk_iterators(reader, 6, None, None)
    assert reader.read == 0
    assert tokens(first, 2) == [1, 2] and reader.read == 2
    assert tokens(second, 1) == [1] and reader.read == 2
    # The second may overtake the first.
    assert tokens(second, 3) == [2, 3, 4] and reader.read == 4
    assert tokens(first, 4) == [3, 4, 5, 6] and tokens(second, 2) == [5, 6]
    assert reader.read == 6 and list(first) == list(second) == []


def test_each_chunk_has_a_dict_of_its_own() -> None:
    first, second = chunk_iterators(Reader(), 1, None, None)
    batch = next(first)
    batch["tokens"] = None
    assert next(second)["tokens"] is not None


def test_what_a_mirror_sent_is_pinned(monkeypatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    sent = [{"tokens": torch.tensor([10 + i]), "name": "x"} for i in range(3)]
    monkeypatch.setattr(microbatch_data, "swap", lambda value, peer, group: sent)
    first, second = chunk_iterators(Reader(), 3, 1, None)
    assert tokens(first, 3) == [1, 2, 3] and tokens(second, 3) == [10, 11, 12]
    assert [int(tensor) for tensor in pinned] == [10, 11, 12]


def test_a_middle_rank_reads_nothing() -> None:
    assert chunk_iterators(None, 4, None, None) == [None, None]
