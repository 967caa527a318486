"""Pages of a prompt in another engine: the answers of one engine, and the prompt is not computed again."""

import pytest
import torch

from dsv3_megatron.inference import Sampling
from dsv3_megatron.inference.transport import (
    PromptPages,
    put_pages,
    receive_pages,
    send_pages,
    take_pages,
)
from tests.harness import run_distributed
from tests.inference.models import engine, opened, prompts, write_model

HOW = Sampling(max_new_tokens=24, temperature=0.7, seed=5)
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with opened(write_model(tmp_path_factory.mktemp("model"))) as model:
        yield model


def _batch():
    return prompts(200, 131, 20, vocab_size=96)


def _first(running, batch):
    """The prefilling deployment's part: one token of each."""
    one = Sampling(max_new_tokens=1, temperature=HOW.temperature)
    return [answer.tokens for answer in running.generate(batch, one, seeds=SEEDS)]


def _rest(running, batch, first):
    """The decoding deployment's part."""
    rest = Sampling(max_new_tokens=HOW.max_new_tokens - 1, temperature=HOW.temperature)
    longer = [prompt + tokens for prompt, tokens in zip(batch, first, strict=True)]
    answers = running.generate(longer, rest, seeds=SEEDS)
    return [tokens + answer.tokens for tokens, answer in zip(first, answers, strict=True)]


@pytest.mark.parametrize("speculative", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_request_that_moves_gets_the_tokens_of_one_that_stays(model, speculative):
    settings = {"max_length": 256, "speculative": speculative, "max_batch": 4}
    batch = _batch()
    wanted = [answer.tokens for answer in engine(model, **settings).generate(batch, HOW, seeds=SEEDS)]
    prefilling, decoding, spoilt = (engine(model, **settings, prefix_caching=True) for _ in range(3))
    first = _first(prefilling, batch)
    before = decoding.context.kv_block_allocator.total_avail
    counts = []
    for prompt in batch:
        pages = take_pages(prefilling, prompt)
        counts.append(len(pages.hashes))
        assert put_pages(decoding, pages) == len(pages.hashes)
        assert put_pages(decoding, pages) == 0  # it has them
        put_pages(spoilt, PromptPages(pages.hashes, torch.randn_like(pages.latents)))
    assert counts == [3, 2, 0]
    assert before - decoding.context.kv_block_allocator.total_avail == 5
    assert _rest(decoding, batch, first) == wanted
    assert decoding.engine._prefill_tokens_skipped == 5 * 64
    assert _rest(spoilt, batch, first) != wanted  # the control: pages are read, not computed again


def test_without_room_the_prompt_is_computed(model):
    batch = _batch()[:1]
    settings = {"max_length": 256, "max_batch": 1, "prefix_caching": True}
    wanted = [a.tokens for a in engine(model, **settings).generate(batch, HOW, seeds=SEEDS[:1])]
    prefilling, decoding = (engine(model, **settings) for _ in range(2))
    one = Sampling(max_new_tokens=1, temperature=HOW.temperature)
    first = prefilling.generate(batch, one, seeds=SEEDS[:1])[0].tokens
    pages = take_pages(prefilling, batch[0])
    room = decoding.context.kv_block_allocator.total_avail
    many = PromptPages(
        list(range(1, room + 2)), pages.latents[:, :1].expand(-1, room + 1, -1, -1).contiguous()
    )
    assert put_pages(decoding, many) == 0
    rest = Sampling(max_new_tokens=HOW.max_new_tokens - 1, temperature=HOW.temperature)
    (answer,) = decoding.generate([batch[0] + first], rest, seeds=SEEDS[:1])
    assert first + answer.tokens == wanted[0]


def test_pages_of_another_kind_are_refused(model):
    keeping = engine(model, prefix_caching=True)
    with pytest.raises(ValueError, match="do not fit a cache of 3 layers × 64 tokens × 24 float32"):
        put_pages(keeping, PromptPages([5], torch.zeros(4, 1, 64, 24)))
    with pytest.raises(ValueError, match="bfloat16 do not fit"):
        put_pages(keeping, PromptPages([5], torch.zeros(3, 1, 64, 24, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match="prefix_caching=True"):
        take_pages(engine(model), [1] * 64)


def _two_deployments(rank, world_size, folder):
    import torch.distributed as dist

    from dsv3_megatron.serve.load import use_device

    use_device("cpu")
    batch = _batch()
    with opened(folder) as model:
        running = engine(model, max_length=256, max_batch=4, prefix_caching=True, speculative=True)
        if rank == 0:
            first = _first(running, batch)
            for prompt in batch:
                send_pages(take_pages(running, prompt), 1)
            dist.broadcast_object_list([first], 0)
            return None
        for _ in batch:
            put_pages(running, receive_pages(running, 0))
        told = [None]
        dist.broadcast_object_list(told, 0)
        answers = _rest(running, batch, told[0])
        return answers, running.engine._prefill_tokens_skipped


@pytest.mark.slow
def test_two_processes_one_prefills_one_decodes(model, tmp_path):
    batch = _batch()
    folder = write_model(tmp_path / "again")
    wanted = [a.tokens for a in engine(model, max_length=256, max_batch=4).generate(batch, HOW, seeds=SEEDS)]
    _, (answers, skipped) = run_distributed(_two_deployments, 2, init=False, folder=folder)
    assert answers == wanted and skipped == 5 * 64
