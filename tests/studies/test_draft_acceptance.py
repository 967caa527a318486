"""The study of draft acceptance: what it counts, and its standard errors."""

import random
import statistics

import pytest

from dsv3_megatron.studies.draft_acceptance import PROMPT, _choices, _measure_batch, as_drafted, share
from tests.inference.models import opened, prompts, write_model

NEW = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with opened(write_model(tmp_path_factory.mktemp("model"), vocab_size=12)) as model:
        yield model


def test_an_accepted_draft_is_followed_by_a_sample():
    assert as_drafted([1, 0, 0, 1, 1, 1, 0]) == [1, 0, 1, 1]
    assert as_drafted([]) == []


def test_the_standard_error_is_that_of_independent_rows():
    """Against the spread of the mean over many draws; rows of alike entries, whose count of entries would mislead."""
    source = random.Random(0)
    means, errors = [], []
    for _ in range(300):
        rows = [[int(source.random() < p)] * source.choice((5, 10)) for p in (0.3, 0.7) * 10]
        mean, error = share(rows)
        means.append(mean)
        errors.append(error)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(means), rel=0.2)
    naive = (0.25 / 150) ** 0.5
    assert statistics.mean(errors) > 2 * naive


def test_the_engine_accepts_what_the_layer_predicts_where_it_drafts(model):
    record = _measure_batch(model, prompts(*[PROMPT + NEW] * 3, vocab_size=12), NEW)
    drafted = [hit for row in record["whole"] for hit in as_drafted(row)]
    assert record["accepted"] == sum(drafted) > 0
    assert record["proposed"] == len(drafted) < sum(map(len, record["whole"]))
    assert all(len(row) == NEW - 1 for kind in ("whole", "one") for row in record[kind])


def test_one_position_is_the_whole_context_where_there_is_no_more(model):
    (tokens,) = prompts(60, vocab_size=12)
    long, short = _choices(model, tokens), [_choices(model, tokens[i : i + 2]) for i in (0, 20)]
    assert short[0].whole[0] == short[0].one[0] == long.one[0] == long.whole[0]
    assert short[1].whole[0] == short[1].one[0]  # position 20 as the first of its own text
    assert long.whole != long.one
