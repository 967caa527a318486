"""Which piece goes where: all pieces of a move, each once, and both ends in one order."""

import random

import pytest
import torch

from dsv3_megatron.expert_placement.pieces import Move, Peer, moves_between, pieces


def test_moves_lead_from_one_placement_to_the_other():
    before, after = [0, 1, 2, 3, 4, 5], [0, 4, 2, 1, 3, 5]
    moves = moves_between(before, after, per_rank=2)
    assert moves == [Move(2, 0, 0, 1), Move(0, 1, 1, 1), Move(1, 1, 2, 0)]
    assert moves_between(after, after, 2) == []


@pytest.mark.parametrize("between_copies", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_carrying_by_pieces_is_exchanging_the_tensors(seed, between_copies):
    """Three expert ranks × two tensor parts × two copies; random shards, empty ones too."""
    draw = random.Random(seed)
    per_rank, size = 4, 50
    peers = [Peer(e, t, c) for c in range(2) for e in range(3) for t in range(2)]
    after = draw.sample(range(12), 12)
    moves = moves_between(range(12), after, per_rank)
    # Cuts of each slot's tensor between the two copies, the same on all expert ranks.
    cuts = [draw.choice([0, size, draw.randrange(size)]) for _ in range(per_rank)]

    def held(rank: int, slot: int) -> tuple[int, int] | None:
        if not between_copies:
            return 0, size
        start, end = (0, cuts[slot]) if peers[rank].copy == 0 else (cuts[slot], size)
        return (start, end) if start < end else None

    def content(expert: int, part: int) -> torch.Tensor:
        return torch.arange(size) + 1000 * expert + 100_000 * part

    have = {
        (rank, slot): content(peer.expert * per_rank + slot, peer.tensor)
        for rank, peer in enumerate(peers)
        for slot in range(per_rank)
    }
    plans = [pieces(moves, rank, peers, held, between_copies) for rank in range(len(peers))]
    got = {key: value.clone() for key, value in have.items()}
    for a in range(len(peers)):
        for b in range(len(peers)):
            sent = [have[a, p.slot][p.start : p.end] for p in plans[a][0][b]]
            places = plans[b][1][a]
            assert [len(s) for s in sent] == [p.end - p.start for p in places]
            for values, place in zip(sent, places, strict=True):
                got[b, place.slot][place.start : place.end] = values
    for rank, peer in enumerate(peers):
        for slot in range(per_rank):
            part = held(rank, slot)
            if part is not None:
                wanted = content(after[peer.expert * per_rank + slot], peer.tensor)[slice(*part)]
                assert torch.equal(got[rank, slot][slice(*part)], wanted)
