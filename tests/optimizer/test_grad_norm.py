"""The clipping norm: exact to fp32, and the same bits however gradients are cut and dealt out."""

import math
import random

import pytest
import torch

from dsv3_megatron.optimizer.grad_norm import exact_norm


def norm_over(ranks: list[list[torch.Tensor]]) -> torch.Tensor:
    """As if each list were a rank's: the reductions in two passes, by calling it for every rank."""
    peaks: list[torch.Tensor] = []
    for grads in ranks:
        exact_norm(grads, lambda x: peaks.append(x.clone()), lambda x: None, len(ranks))
    most = torch.stack(peaks).amax(0)

    def take(x: torch.Tensor) -> None:
        x.copy_(most)

    sums: list[torch.Tensor] = []
    for grads in ranks:
        exact_norm(grads, take, lambda x: sums.append(x.clone()), len(ranks))
    total = torch.stack(sums).sum(0)

    def put(x: torch.Tensor) -> None:
        x.copy_(total)

    found = [exact_norm(grads, take, put, len(ranks)) for grads in ranks]
    assert len({norm.item() for norm in found}) == 1
    return found[0]


def cut(values: torch.Tensor, draw: random.Random, num_ranks: int) -> list[list[torch.Tensor]]:
    """The values in another order, in pieces of any size on any rank; as many on the fullest rank at most."""
    shuffled = values[
        torch.randperm(len(values), generator=torch.Generator().manual_seed(draw.randrange(1000)))
    ]
    ranks: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
    for index, part in enumerate(shuffled.chunk(num_ranks)):
        edges = sorted(draw.sample(range(len(part) + 1), 3))
        ranks[index] = list(part.tensor_split(edges))
    return ranks


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_bits_do_not_depend_on_where_gradients_lie(scale):
    torch.manual_seed(0)
    draw = random.Random(0)
    values = torch.randn(12_000) * (torch.randn(12_000) * 4).exp() * scale
    wanted = norm_over(cut(values, draw, 4))
    assert wanted.float() == values.double().norm().float()
    for _ in range(20):
        assert norm_over(cut(values, draw, 4)) == wanted
    # What this replaces does depend on it.
    plain = {
        sum(part.norm() ** 2 for rank in cut(values, draw, 4) for part in rank).item() for _ in range(20)
    }
    assert len(plain) > 1


def test_close_to_the_norm_for_any_number_of_gradients():
    torch.manual_seed(1)
    for count in (1, 3, 1000, 200_000):
        values = torch.randn(count)
        found = exact_norm([values], lambda x: None, lambda x: None, 1)
        assert found.item() == pytest.approx(values.double().norm().item(), rel=1e-12)
    half = torch.randn(1000).bfloat16()
    assert exact_norm([half], lambda x: None, lambda x: None, 1).item() == pytest.approx(
        half.double().norm().item()
    )


def test_zero_nothing_and_what_is_not_finite():
    def of(*grads: torch.Tensor) -> float:
        return exact_norm(grads, lambda x: None, lambda x: None, 8).item()

    assert of() == 0 and of(torch.zeros(5)) == 0 and of(torch.zeros(0), torch.tensor([3.0, 4.0])) == 5
    assert of(torch.tensor([1.0, math.inf])) == math.inf
    assert math.isnan(of(torch.tensor([1.0, math.nan])))
