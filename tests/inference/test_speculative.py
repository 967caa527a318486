"""Drafts of the MTP layer change no token and no distribution, and see the whole context."""

import itertools
from collections import Counter

import pytest
import torch

from dsv3_megatron.inference import Sampling
from dsv3_megatron.inference.controller import LatentController
from tests.inference.models import another, engine, full_logits, opened, prompts, write_model

GREEDY = Sampling(max_new_tokens=64, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with opened(write_model(tmp_path_factory.mktemp("model"))) as model:
        yield model


def mtp_choices(model, tokens):
    """The MTP layer's first choice of token i + 2 at each place i, by the trainer's pass over the whole sequence."""
    found = {}
    layer = model.mtp.layers[0]
    hook = layer.register_forward_hook(lambda module, args, output: found.update(hidden=output[0]))
    try:
        full_logits(model, tokens)
    finally:
        hook.remove()
    with torch.no_grad():
        logits, _ = model.output_layer(found["hidden"])
    return logits[:, 0].argmax(-1).tolist()


def drafts_of(served, prompt, count):
    """Drafts that the engine verified, by the place of the token that they were for."""
    drafts = {}
    controller, context = served.engine.controller, served.context
    compute = controller._compute_serial_mtp_and_sample

    def record(*args):
        compute(*args)
        place = (
            int((context.request_kv_length_offsets + context.request_query_lengths)[context.active_slice][0])
            + 1
        )
        drafts[place] = int(controller._sampled_mtp_tokens_cuda[0, 0])

    controller._compute_serial_mtp_and_sample = record
    (generation,) = served.generate([prompt], Sampling(max_new_tokens=count, temperature=0))
    return drafts, generation.tokens


@pytest.mark.parametrize("max_step_tokens", [11, pytest.param(64, marks=pytest.mark.slow)])
def test_a_draft_is_what_the_layer_predicts_with_the_whole_context(model, max_step_tokens):
    """After prompts in one piece or in chunks, accepted and rejected drafts: each equals the teacher-forced one."""
    prompt = prompts(37)[0]
    drafts, tokens = drafts_of(engine(model, speculative=True, max_step_tokens=max_step_tokens), prompt, 60)
    choices = mtp_choices(model, prompt + tokens)
    places = [place for place in drafts if place < len(prompt) + len(tokens)]
    assert len(places) > 25
    assert [drafts[place] for place in places] == [choices[place - 2] for place in places]


@pytest.mark.slow
def test_without_earlier_pages_the_drafts_would_differ(model, monkeypatch):
    """The control: without what it saw before, the layer predicts otherwise."""
    narrow = LatentController._draft_logits

    def only_the_step(self, last, sampled):
        context = self._context
        context.memory_buffer[context.num_attention_layers] = 0  # what the layer saw before this step
        return narrow(self, last, sampled)

    monkeypatch.setattr(LatentController, "_draft_logits", only_the_step)
    prompt = prompts(37)[0]
    drafts, tokens = drafts_of(engine(model, speculative=True), prompt, 60)
    choices = mtp_choices(model, prompt + tokens)
    places = [place for place in drafts if place < len(prompt) + len(tokens)]
    assert [drafts[place] for place in places] != [choices[place - 2] for place in places]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_step_tokens": 9},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in ({}, {"max_batch": 2}, {"cache_bytes": 7 * 64 * 4 * 24 * 4})
        ),
    ],
)
def test_greedy_answers_are_those_without_drafts(model, settings):
    batch = prompts(3, 62, 17, 30, 63, 64)
    plain = [g.tokens for g in engine(model).generate(batch, GREEDY)]
    served = engine(model, speculative=True, **settings)
    assert [g.tokens for g in served.generate(batch, GREEDY)] == plain
    assert served.statistics.proposed > 100


@pytest.mark.slow
def test_acceptance_is_what_was_accepted(model):
    """Counted from the answers and the trainer's MTP choices: a draft after each token that was not a draft itself."""
    served = engine(model, speculative=True, max_batch=1)
    batch = prompts(9, 20, 33)
    proposed = accepted = 0
    for prompt, generation in zip(batch, served.generate(batch, GREEDY), strict=True):
        sequence = prompt + generation.tokens
        choices = mtp_choices(model, sequence)
        place = len(prompt) + 1  # of the token that the first draft is for
        while place < len(sequence):
            right = choices[place - 2] == sequence[place]
            proposed, accepted = proposed + 1, accepted + right
            place += 1 + right
    statistics = served.statistics
    # The last draft of a request may be for a token that is cut off.
    assert 0 <= statistics.proposed - proposed <= len(batch)
    assert 0 <= statistics.accepted - accepted <= len(batch)
    assert statistics.tokens_per_pass == 1 + statistics.accepted / statistics.proposed


VOCABULARY, LENGTH, SAMPLES = 4, 3, 2000


@pytest.fixture(scope="module")
def toy(model, tmp_path_factory):
    """A model of four tokens, so that all answers of three tokens can be listed."""
    folder = write_model(tmp_path_factory.mktemp("toy"), vocab_size=VOCABULARY)
    small = another(folder)
    with torch.no_grad():
        small.output_layer.weight.mul_(0.5)  # nearer to even, so that no answer is rare
    return small


def distribution(model, prompt):
    """Probability of every answer, from the trainer's logits."""
    table = {}
    for answer in itertools.product(range(VOCABULARY), repeat=LENGTH):
        log_probs = full_logits(model, prompt + list(answer)).log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) - 1 + LENGTH)
        table[answer] = float(sum(log_probs[p, t] for p, t in zip(places, answer, strict=True)).exp())
    return table


def chi_square(counts, table):
    total = sum(counts.values())
    assert min(table.values()) * total > 4
    return sum((counts[answer] - p * total) ** 2 / (p * total) for answer, p in table.items())


LIMIT = 107.0  # χ² of 63 degrees, 0.05%


def sampled(model, prompt, **settings):
    served = engine(model, speculative=True, max_batch=64, **settings)
    found = served.generate([prompt] * SAMPLES, Sampling(max_new_tokens=LENGTH, seed=2))
    return Counter(tuple(g.tokens) for g in found), served.statistics


def test_sampled_answers_have_the_models_distribution(toy):
    prompt = [1, 2, 0]
    counts, statistics = sampled(toy, prompt)
    assert chi_square(counts, distribution(toy, prompt)) < LIMIT
    assert 0.2 < statistics.acceptance < 0.98  # drafts were accepted, and drafts were rejected


@pytest.mark.slow
def test_accepting_every_draft_would_be_told_apart(toy, monkeypatch):
    """The control: without verification the answers follow the MTP layer."""

    def accept_all(self, output, required, num_decode, num_prefill, count):
        last, mask, given = verify(self, output, required, num_decode, num_prefill, count)
        width = self.num_speculative_tokens + 1
        mask = torch.ones_like(mask)
        ends = torch.arange(num_decode, device=last.device) * width + width - 1
        return torch.cat([ends, last[num_decode:]]), mask, given

    verify = LatentController._verify_speculative_tokens
    monkeypatch.setattr(LatentController, "_verify_speculative_tokens", accept_all)
    prompt = [1, 2, 0]
    counts, _ = sampled(toy, prompt)
    assert chi_square(counts, distribution(toy, prompt)) > 3 * LIMIT


@pytest.mark.slow
def test_drafts_agree_more_often_than_independent_ones_would(toy):
    """A draft shares the noise of its place: it agrees at least (1 − d) / (1 + d) of the time."""
    prompt = [1, 2, 0]
    _, statistics = sampled(toy, prompt)
    independent = sum(p * p for p in distribution(toy, prompt).values())
    assert statistics.acceptance > independent
