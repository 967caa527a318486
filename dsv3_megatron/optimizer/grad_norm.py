"""A gradient norm whose bits do not depend on where gradients lie: on which rank, in which order, in which shards.

Squares are cut into a few parts, each a multiple of a power of two that leaves room for the sum: every addition is then
exact, and sums of exact numbers have one value in any order (Demmel and Nguyen, "Fast reproducible floating-point
summation", ARITH 2013). What is cut off at the end is below 2⁻⁵² of the largest square times the number of them, three
times over; the result is rounded to fp32 at last.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["exact_norm"]

_PARTS = 3
_CHUNK = 1 << 22  # elements that are squared at once, in fp64


def exact_norm(
    grads: Iterable[Tensor],
    all_reduce_max: Callable[[Tensor], None],
    all_reduce_sum: Callable[[Tensor], None],
    num_ranks: int,
    device: torch.device | str | int = "cpu",
) -> Tensor:
    """√Σg² over the gradients of all ranks, fp64, the same bits for any distribution of them.

    Args:
        grads: this rank's, fp32 or bf16.
        all_reduce_max, all_reduce_sum: in place, over the `num_ranks` ranks.
    """
    chunks = [chunk for grad in grads for chunk in grad.detach().reshape(-1).split(_CHUNK)]
    largest = [torch.linalg.vector_norm(chunk, torch.inf).double() for chunk in chunks if len(chunk)]
    most = torch.zeros(
        2, dtype=torch.float64, device=device
    )  # largest gradient, and number of them on a rank
    if largest:
        most[0] = torch.stack(largest).max()
        most[1] = sum(map(len, chunks))
    all_reduce_max(most)
    peak, number = most.tolist()
    if peak == 0 or not math.isfinite(peak):
        return most[0]
    room = math.ceil(math.log2(number * num_ranks))  # a sum is below 2^room of the largest part
    unit = 2.0 ** (2 * math.frexp(peak)[1] + room - 52)
    units = [unit * 2.0 ** (k * (room - 52)) for k in range(_PARTS)]
    sums = torch.zeros(_PARTS, dtype=torch.float64, device=device)
    for chunk in chunks:
        rest = chunk.double().square_()
        for k, step in enumerate(units):
            shift = 1.5 * 2.0**52 * step  # adding and subtracting it rounds to a multiple of `step`
            part = (rest + shift) - shift
            rest -= part
            sums[k] += part.sum()
    all_reduce_sum(sums)
    return sums.flip(0).cumsum(0)[-1].sqrt()  # the smallest part first
