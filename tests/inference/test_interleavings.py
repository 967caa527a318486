"""Requests that arrive and are aborted at random times get the tokens that each gets alone."""

import random

import pytest

from dsv3_megatron.inference import Sampling
from tests.inference.models import engine, opened, prompts, write_model

EPISODES = 200  # of each kind in the slow run
FEW = 6  # in the default one
LENGTHS = (1, 5, 62, 63, 64, 70, 30, 2)
NEW_TOKENS = (1, 3, 9, 14)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    with opened(folder) as model:
        yield model


@pytest.fixture(scope="module")
def pool(model):
    """(prompt, sampling, the answer alone): greedy and sampled, around the ends of pages."""
    alone = engine(model, max_batch=1)
    found = []
    for index, prompt in enumerate(prompts(*LENGTHS)):
        for temperature in (0, 0.8):
            how = Sampling(max_new_tokens=NEW_TOKENS[index % 4], temperature=temperature, seed=index)
            (generation,) = alone.generate([prompt], how)
            found.append((prompt, how, generation.tokens))
    return found


class Episode:
    """Some requests of the pool, each with the step at which it arrives, some with one at which it is aborted."""

    def __init__(self, rng, pool):
        self.requests = [
            (rng.choice(pool), rng.randrange(12), rng.randrange(16) if rng.random() < 0.35 else None)
            for _ in range(rng.randrange(3, 8))
        ]

    def run(self, served):
        """(request, generation) pairs of all."""
        numbers, done = {}, []
        step = 0
        while len(done) < len(self.requests):
            for index, ((prompt, how, _), arrives, _aborted) in enumerate(self.requests):
                if arrives == step:
                    numbers[served.submit(prompt, how)] = index
            for number, index in numbers.items():
                if self.requests[index][2] == step:
                    served.abort(number)
            done += [(self.requests[numbers[number]], generation) for number, generation in served.step()]
            step += 1
            assert step < 400, "requests do not end"
        return done


def check(model, pool, episodes, **settings):
    # Few pages: requests wait, are paused, lose their pages and get others. Few tokens a step: prompts go in chunks.
    served = engine(
        model, max_batch=4, max_step_tokens=24, cache_bytes=settings.pop("pages") * 64 * 24 * 4, **settings
    )
    context = served.context
    pages = context.kv_block_allocator.total_avail
    completed = cut = 0
    for seed in range(episodes):
        for (request, _, abort), generation in Episode(random.Random(seed), pool).run(served):
            wanted = request[2]
            if generation.finish_reason == "abort":
                assert abort is not None and generation.tokens == wanted[: len(generation.tokens)]
                cut += len(generation.tokens) < len(wanted)
            else:
                assert generation.tokens == wanted, seed
                completed += 1
        assert context.kv_block_allocator.total_avail == pages and not served.engine.requests, seed
        assert not context.seeds and not context.following_prompt_tokens and not served.engine._watches
    assert completed > 2 * episodes and cut > episodes // 8
    return served


def test_plain(model, pool):
    served = check(model, pool, FEW, pages=2 * 6)
    assert served.context.kv_block_allocator.total_avail  # pages are back


def test_with_drafts(model, pool):
    served = check(model, pool, FEW, pages=3 * 7, speculative=True)
    assert served.statistics.accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("pages", [5, 7, 40])
def test_more_of_them(model, pool, speculative, pages):
    layers = 3 if speculative else 2
    served = check(model, pool, EPISODES, pages=layers * pages, speculative=speculative)
    # Four requests at a time need up to two pages each: with fewer than eight some lost theirs and got others.
    assert (served.engine.evicted_request_count > 0) == (pages < 8)


def test_another_seed_would_be_told_apart(model, pool):
    """The control: the answers in the pool are not what any request would get."""
    served = engine(model, max_batch=4)
    different = 0
    for prompt, how, wanted in pool:
        if how.temperature:
            (generation,) = served.generate([prompt], how, seeds=[12345])
            different += generation.tokens != wanted
    assert different > len(pool) // 4
