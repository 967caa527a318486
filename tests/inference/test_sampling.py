"""The noise is Gumbel's and depends on its keys alone; filtering is that of transformers."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dsv3_megatron.inference.sampling import filtered_logits, gumbel_noise, request_seed


def noise(seeds, positions, vocab=1000):
    return gumbel_noise(torch.tensor(seeds), torch.tensor(positions), vocab)


def test_noise_is_standard_gumbel():
    values = noise([request_seed(7, i) for i in range(200)], list(range(200))).double().flatten()
    uniform = torch.exp(-torch.exp(-values)).sort().values
    steps = torch.arange(1, len(uniform) + 1) / len(uniform)
    # Kolmogorov-Smirnov: 1.63 / √n is its 1% point; 24 bits and fp32 logarithms are finer than that.
    assert (uniform - steps).abs().max() < 1.63 / len(uniform) ** 0.5


@pytest.mark.parametrize("along", ["token", "position", "seed"])
def test_noise_of_neighbours_is_uncorrelated(along):
    many = [request_seed(1, i) for i in range(400)]
    pairs = {
        "token": (noise(many, [5] * 400)[:, :-1], noise(many, [5] * 400)[:, 1:]),
        "position": (noise(many, [5] * 400), noise(many, [6] * 400)),
        "seed": (noise(list(range(400)), [5] * 400), noise(list(range(1, 401)), [5] * 400)),
    }
    first, second = (x.flatten().double() - x.double().mean() for x in pairs[along])
    correlation = (first * second).mean() / (first.std() * second.std())
    assert abs(correlation) < 4 / len(first) ** 0.5


def test_noise_depends_on_its_keys_alone():
    together, alone = noise([3, 9], [4, 5]), noise([9], [5])
    assert torch.equal(together[1:], alone)
    assert not torch.equal(noise([9], [6]), alone) and not torch.equal(noise([8], [5]), alone)
    assert torch.equal(noise([9], [5], vocab=10), alone[:, :10])


def test_argmax_with_noise_draws_from_the_softmax():
    logits = torch.tensor([1.2, 0.0, -0.7, 0.4, -3.0])
    count = 40_000
    seeds = torch.tensor([request_seed(0, i) for i in range(count)])
    drawn = (logits + gumbel_noise(seeds, torch.zeros_like(seeds), 5)).argmax(-1).bincount(minlength=5)
    wanted = logits.softmax(-1) * count
    assert ((drawn - wanted) ** 2 / wanted).sum() < 18.5  # χ² of 4 degrees, 0.1%
    shifted = (logits + 0.1 * torch.arange(5)).softmax(-1) * count
    assert ((drawn - shifted) ** 2 / shifted).sum() > 18.5  # the control: another distribution is told apart


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 0.9), (2.0, 7, 1.0), (0.8, 12, 0.6)]
)
def test_filtering_is_that_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
    wanted = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    torch.testing.assert_close(filtered_logits(logits, temperature, top_k, top_p), wanted)
