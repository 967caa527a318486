"""Which piece of an expert's tensor goes from which rank to which. Pure.

The ranks that hold an expert-parallel group's copies each have a part of an expert's tensors: all of a weight, and the
range that the distributed optimizer has given them of a master or a moment. Slots differ in their ranges, so a piece
may go to another copy's rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Move", "Peer", "Piece", "moves_between", "pieces"]

Range = tuple[int, int]


@dataclass(frozen=True)
class Peer:
    """Where a rank of the stage stands: expert-parallel rank, expert-tensor-parallel rank, and which copy."""

    expert: int
    tensor: int
    copy: int


@dataclass(frozen=True)
class Move:
    """An expert leaves slot `from_slot` of expert-parallel rank `from_rank`; slots count on their rank."""

    from_rank: int
    from_slot: int
    to_rank: int
    to_slot: int


@dataclass(frozen=True)
class Piece:
    """Elements [start, end) of a slot's flattened tensor."""

    slot: int
    start: int
    end: int


def moves_between(before: Sequence[int], after: Sequence[int], per_rank: int) -> list[Move]:
    """The moves that lead from one placement of a layer (the expert of each slot) to another, by their new slots."""
    at = {expert: slot for slot, expert in enumerate(before)}
    return [
        Move(*divmod(at[expert], per_rank), *divmod(slot, per_rank))
        for slot, expert in enumerate(after)
        if at[expert] != slot
    ]


def pieces(
    moves: Sequence[Move],
    me: int,
    peers: Sequence[Peer],
    held: Callable[[int, int], Range | None],
    between_copies: bool,
) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """What this rank sends to each and receives from each, in one order at both ends.

    Args:
        me: index of this rank in `peers`.
        held: (index of a rank, slot) → the range it has of that slot's tensor, None where it has nothing.
        between_copies: whether the ranges of the copies' ranks make up one tensor; else each has a whole one of its
            own, and copy c sends to copy c.
    """
    outgoing: list[list[Piece]] = [[] for _ in peers]
    incoming: list[list[Piece]] = [[] for _ in peers]

    def meet(a: int, b: int) -> bool:
        return peers[a].tensor == peers[b].tensor and (between_copies or peers[a].copy == peers[b].copy)

    for move in moves:
        sources = [i for i, peer in enumerate(peers) if peer.expert == move.from_rank]
        targets = [i for i, peer in enumerate(peers) if peer.expert == move.to_rank]
        for source in sources if me in targets else [me] if me in sources else []:
            for target in targets if me == source else [me]:
                if not meet(source, target):
                    continue
                common = _common(held(source, move.from_slot), held(target, move.to_slot))
                if common is None:
                    continue
                if source == me:
                    outgoing[target].append(Piece(move.from_slot, *common))
                if target == me:
                    incoming[source].append(Piece(move.to_slot, *common))
    return outgoing, incoming


def _common(a: Range | None, b: Range | None) -> Range | None:
    if a is None or b is None:
        return None
    start, end = max(a[0], b[0]), min(a[1], b[1])
    return (start, end) if start < end else None
