"""The engine against transformers and against the trainer's forward pass, fp32."""

import gc

import pytest
import torch

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.inference import Engine, EngineSettings, Sampling
from dsv3_megatron.inference.engine import cache_bytes_per_token
from tests.inference.models import (
    CONFIGS,
    another,
    engine,
    full_log_probs,
    full_logits,
    opened,
    prompts,
    recorded_logits,
    transformers_greedy,
    write_model,
)

GREEDY = Sampling(max_new_tokens=64, temperature=0)
UNEVEN = (3, 41, 17, 30, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with opened(write_model(tmp_path_factory.mktemp("model"))) as model:
        yield model


@pytest.mark.parametrize(
    "name", ["yarn", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "yarn")]
)
def test_greedy_tokens_and_logits_are_those_of_transformers(model, name, tmp_path):
    """64 tokens from prompts of different lengths in one batch; logits of every step within 1e-4."""
    folder = write_model(tmp_path, **CONFIGS[name])
    batch = prompts(*UNEVEN)
    wanted, logits = transformers_greedy(folder, batch, 64)
    served = engine(another(folder))
    with recorded_logits(served) as rows:
        found = served.generate(batch, GREEDY)
    assert [g.tokens for g in found] == wanted
    for request in range(len(batch)):
        torch.testing.assert_close(torch.stack(rows[request]), logits[:, request], rtol=0, atol=1e-4)


def test_log_probs_are_the_trainers(model):
    sequences = prompts(2, 100, 37, 64, 65)
    for found, tokens in zip(engine(model).log_probs(sequences), sequences, strict=True):
        torch.testing.assert_close(found, full_log_probs(model, tokens), rtol=0, atol=1e-5)
    assert engine(model).log_probs([[5]])[0].shape == (0,)


def test_first_choices_are_the_trainers(model):
    (prompt,) = prompts(9)
    with_engine = engine(model, max_step_tokens=8)  # in chunks
    (answer,) = with_engine.generate([prompt], Sampling(max_new_tokens=12, temperature=0))
    (_, greedy), (_, other) = with_engine.score([prompt + answer.tokens, prompt])
    assert greedy[-12:].all()
    wanted = full_logits(model, prompt)[:-1].argmax(-1) == torch.tensor(prompt[1:])
    assert torch.equal(other, wanted) and not other.all()


def test_log_probs_of_generated_tokens_are_the_trainers(model):
    batch = prompts(9, 30)
    for speculative in (False, True):
        for prompt, generation in zip(
            batch,
            engine(model, speculative=speculative).generate(
                batch, Sampling(max_new_tokens=40, seed=3, log_probs=True)
            ),
            strict=True,
        ):
            wanted = full_log_probs(model, prompt + generation.tokens)[len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(generation.log_probs), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "max_step_tokens", [16, *(pytest.param(tokens, marks=pytest.mark.slow) for tokens in (7, 64))]
)
def test_a_prompt_in_chunks_is_a_whole_one(model, max_step_tokens):
    """Tokens, log-probabilities of the prompt (at the seams of the chunks too), several prompts at a time."""
    batch = prompts(50, 23, 5, 64)
    whole = engine(model, max_batch=4)
    chunked = engine(model, max_batch=4, max_step_tokens=max_step_tokens)
    assert [g.tokens for g in chunked.generate(batch, GREEDY)] == [
        g.tokens for g in whole.generate(batch, GREEDY)
    ]
    for found, tokens in zip(chunked.log_probs(batch), batch, strict=True):
        torch.testing.assert_close(found, full_log_probs(model, tokens), rtol=0, atol=1e-5)


def test_weights_lie_as_products_read_them_with_shapes_and_values_kept(model, tmp_path):
    """Of a model that was loaded to serve; an engine leaves another's memory as optimizer and checkpoints know it."""
    other = another(write_model(tmp_path))  # the same weights
    for one in (model, other):
        engine(one).generate(prompts(5, 3), Sampling(max_new_tokens=3, temperature=0))
    weights = dict(model.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in other.named_parameters())
    transposed = {name for name, weight in weights.items() if not weight.is_contiguous()}
    for part, there in (("local_experts", True), ("linear_proj", True), ("linear_kv_up_proj", False)):
        assert any(part in name for name in transposed) == there
    assert all(weight.is_contiguous() for weight in other.parameters())


@pytest.mark.slow
def test_pages_that_were_used_before_are_as_good_as_new(model):
    served = engine(model, max_batch=3)
    first = [g.tokens for g in served.generate(prompts(*UNEVEN), GREEDY)]
    served.generate(prompts(60, 2, 33, seed=9), Sampling(max_new_tokens=50, seed=1))
    assert [g.tokens for g in served.generate(prompts(*UNEVEN), GREEDY)] == first


def test_a_cached_prefix_changes_nothing(model):
    base = prompts(70)[0]
    batch = [base + tail for tail in prompts(3, 20, 1, seed=4)]
    plain = [g.tokens for g in engine(model).generate(batch, GREEDY)]
    served = engine(model, prefix_caching=True)
    assert [g.tokens for g in served.generate([base], GREEDY)]
    assert [g.tokens for g in served.generate(batch, GREEDY)] == plain
    assert served.engine._prefix_cache_hits == len(batch)
    for found, tokens in zip(served.log_probs(batch), batch, strict=True):
        torch.testing.assert_close(found, full_log_probs(model, tokens), rtol=0, atol=1e-5)


def test_the_cache_holds_latents_and_nothing_else(model):
    config = model.config
    served = engine(model, max_batch=4)
    assert served.context.bytes_per_token == cache_bytes_per_token(config) == 3 * (16 + 8) * 4
    buffer = served.context.memory_buffer
    assert buffer.shape[2:] == (64, 16 + 8) and buffer.nbytes == buffer.shape[1] * 64 * 3 * 24 * 4
    drafting = engine(model, speculative=True).context
    assert drafting.bytes_per_token == 4 * (16 + 8) * 4  # the MTP layer's own


def test_the_cache_of_v3():
    class V3:
        num_layers, kv_lora_rank, qk_pos_emb_head_dim, params_dtype = 61, 512, 64, torch.bfloat16

    assert cache_bytes_per_token(V3) == 70_272


def test_bf16_is_near_fp32(model, tmp_path):
    tokens = prompts(60)[0]
    wanted = full_log_probs(model, tokens)
    in_bf16 = another(write_model(tmp_path), dtype="bf16")
    served = engine(in_bf16)
    assert served.context.memory_buffer.dtype == torch.bfloat16
    (found,) = served.log_probs([tokens])
    trainer = full_log_probs(in_bf16, tokens)
    # As near to fp32 as the trainer's own bf16 pass, give or take a factor.
    assert (found - wanted).abs().mean() < 2 * (trainer - wanted).abs().mean()


def test_the_model_trains_as_before(model):
    """Same gradients before and after, module modes and state as they were, and no tensor of inference left over."""

    def gradients():
        model.zero_grad()
        ids = torch.tensor(prompts(20))
        logits = model(ids[:, :-1], torch.arange(19)[None], attention_mask=None)
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[0, 1:]).backward()
        return {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }

    model.train()
    try:
        state = set(model.state_dict())
        before = gradients()
        for speculative in (False, True):
            engine(model, speculative=speculative).generate(prompts(4, 20), GREEDY)
        after = gradients()
        assert model.training and all(module.training for module in model.modules())
        assert set(model.state_dict()) == state
        assert before.keys() == after.keys() and len(before) > 30
        assert all(torch.equal(before[name], after[name]) for name in before)
    finally:
        model.eval()


def test_changed_weights_take_effect_at_once(model):
    """Nothing absorbed is kept: the next call sees what a trainer has written."""
    served = engine(model)
    prompt = prompts(30)[0]
    before = served.log_probs([prompt])[0]
    weight = model.decoder.layers[1].self_attention.linear_kv_up_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn_like(weight) * 0.1)
    try:
        served.refresh()
        after = served.log_probs([prompt])[0]
        torch.testing.assert_close(after, full_log_probs(model, prompt), rtol=0, atol=1e-5)
        assert (after - before).abs().max() > 1e-3
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.slow
def test_ends_stop_strings_and_lengths(model):
    batch = prompts(*UNEVEN)
    plain = [g.tokens for g in engine(model).generate(batch, GREEDY)]
    ends = (plain[0][10], plain[1][20])

    def until(tokens):
        places = [place for place, token in enumerate(tokens) if token in ends]
        return tokens[: places[0] + 1] if places else tokens

    for speculative in (False, True):
        served = Engine(
            model,
            EngineSettings(max_length=128, max_batch=8, speculative=speculative),
            ends=ends,
            decode=lambda ids: "".join(f"<{token}>" for token in ids),
        )
        found = served.generate(batch, GREEDY)
        assert [g.tokens for g in found] == [until(tokens) for tokens in plain]
        assert [g.finish_reason for g in found] == [
            "stop" if until(tokens) != tokens or tokens[-1] in ends else "length" for tokens in plain
        ]
        ignoring = served.generate(batch, Sampling(max_new_tokens=64, temperature=0, ignore_ends=True))
        assert [g.tokens for g in ignoring] == plain
        text = f"<{plain[2][5]}><{plain[2][6]}>"[1:-1]  # begins and ends inside of tokens
        (stopped,) = served.generate(
            [batch[2]], Sampling(max_new_tokens=64, temperature=0, stop=(text,), ignore_ends=True)
        )
        assert stopped.finish_reason == "stop" and stopped.tokens == plain[2][: len(stopped.tokens)]
        assert len(stopped.tokens) <= 7 and text in served._decode(stopped.tokens)


@pytest.mark.parametrize("speculative", [False, True])
def test_tokens_are_told_as_they_come(model, speculative):
    told: list[list[int]] = [[], []]
    served = engine(model, speculative=speculative)
    found = served.generate(prompts(4, 9), GREEDY, on_tokens=lambda index, tokens: told[index].extend(tokens))
    assert told == [g.tokens for g in found]


@pytest.mark.slow
def test_sampled_tokens_do_not_depend_on_the_batch(model):
    """The same seed gives a request the same tokens alone, in company, in chunks, and with drafts."""
    batch, how = prompts(*UNEVEN), Sampling(max_new_tokens=40, temperature=0.9, top_p=0.95, seed=5)
    together = [g.tokens for g in engine(model).generate(batch, how)]
    alone = [
        engine(model, max_batch=1).generate([p], how, seeds=[s])[0].tokens for p, s in _seeded(batch, how)
    ]
    assert alone == together
    for settings in ({"max_step_tokens": 9}, {"speculative": True}, {"max_batch": 2}):
        assert [g.tokens for g in engine(model, **settings).generate(batch, how)] == together
    other = Sampling(max_new_tokens=40, temperature=0.9, top_p=0.95, seed=6)
    assert [g.tokens for g in engine(model).generate(batch, other)] != together


def test_extreme_sampling_is_its_limit(model):
    """Numbers that are 0 in Megatron's fp32, or none in it or in int32."""
    batch = prompts(5, 9)

    def answers(**how):
        return [g.tokens for g in engine(model).generate(batch, Sampling(max_new_tokens=16, seed=5, **how))]

    greedy = answers(temperature=0)
    assert answers(temperature=1e-300) == answers(top_p=1e-300) == greedy
    assert answers(top_k=2**40) == answers() != greedy
    assert answers(temperature=1e300) == answers(temperature=1e30) != greedy


def _seeded(batch, how):
    from dsv3_megatron.inference.sampling import request_seed

    return [(prompt, request_seed(how.seed, index)) for index, prompt in enumerate(batch)]


@pytest.mark.parametrize(
    ("prompt", "sampling", "named"),
    [
        ([], Sampling(), "empty"),
        (list(range(1, 90)) * 2, Sampling(), "--max-length 128"),
        ([5], Sampling(temperature=-1), "--temperature -1"),
        ([5], Sampling(top_p=0), "--top-p 0"),
        ([5], Sampling(max_new_tokens=0), "--max-new-tokens 0"),
        ([5], Sampling(stop=("x",)), "--stop x"),
    ],
)
def test_impossible_requests_are_refused(model, prompt, sampling, named):
    served = engine(model)
    with pytest.raises(RefusedArgument, match=named):
        served.generate([prompt], sampling)
    assert not served.busy


def test_impossible_engines_are_refused(model, tmp_path):
    with pytest.raises(RefusedArgument, match="--cache-gb"):
        engine(model, cache_bytes=64 * 3 * 24 * 4 * 2).generate(prompts(100), GREEDY)
    without_mtp = another(write_model(tmp_path, mtp=False))
    with pytest.raises(RefusedArgument, match="no MTP layer"):
        engine(without_mtp, speculative=True)


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and type(item) is torch.Tensor:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
def test_memory_returns_to_its_start(model):
    served = engine(model, speculative=True)
    free = served.context.kv_block_allocator.total_avail
    served.generate(prompts(*UNEVEN), GREEDY)
    assert served.context.kv_block_allocator.total_avail == free
    assert not served.engine.requests and not served.engine._watches and not served.context.seeds
    served.close()
    del served
    start = live_bytes()
    for _ in range(2):
        another = engine(model, speculative=True)
        assert live_bytes() > start + another.context.memory_buffer.nbytes // 2
        another.generate(prompts(*UNEVEN), GREEDY)
        another.close()
        del another
    assert live_bytes() == start


def test_the_trainers_logits_are_what_the_engine_samples_from(model):
    """At each step of a sampled continuation, not only of a greedy one."""
    prompt = prompts(12)[0]
    served = engine(model)
    with recorded_logits(served) as rows:
        (generation,) = served.generate([prompt], Sampling(max_new_tokens=30, seed=1))
    wanted = full_logits(model, prompt + generation.tokens)[len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack(rows[0]), wanted, rtol=0, atol=1e-4)
