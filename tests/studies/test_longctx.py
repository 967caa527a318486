"""The language of the needles, and what is made of the measurements."""

import numpy as np
import pytest

from dsv3_megatron.studies.longctx import needles
from dsv3_megatron.studies.longctx.results import draw, late, summarise, table
from dsv3_megatron.studies.longctx.worker import BUCKETS, DEPTHS, LENGTHS


def latest_values(tokens: np.ndarray) -> dict[int, int]:
    """Answers by position, from a reading of the tokens as the module's docstring has it."""
    values, answers = {}, {}
    for i, token in enumerate(tokens.tolist()):
        if token >= needles.FIRST_ASSIGNMENT:
            key, value = divmod(token - needles.FIRST_ASSIGNMENT, needles.NUM_VALUES)
            values[key] = value
        elif needles.FIRST_KEY <= token < needles.FIRST_VALUE:
            answers[i + 1] = needles.FIRST_VALUE + values[token - needles.FIRST_KEY]
    return answers


@pytest.mark.parametrize("length", [256, 2048])
def test_questions_are_answered_with_the_latest_value(length: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = needles.sequence(rng, length)
        answers = latest_values(tokens)
        assert tokens.shape == (length,) and tokens.max() < needles.VOCAB_SIZE
        assert len(answers) == needles.QUESTIONS
        assert {i: tokens[i] for i in answers} == answers
        assert set(np.flatnonzero(needles.answers(tokens))) == set(answers)
        assert (tokens >= needles.FIRST_ASSIGNMENT).sum() == needles.ASSIGNMENTS


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_has_one_answer(depth: float) -> None:
    rng = np.random.default_rng(1)
    tokens, answer = needles.needle(rng, 512, depth)
    key = tokens[-1] - needles.FIRST_KEY
    place = round(depth * 510)
    assert tokens[place] == needles.assignment(key, answer - needles.FIRST_VALUE)
    others = np.delete(tokens, place)
    held = others[others >= needles.FIRST_ASSIGNMENT] - needles.FIRST_ASSIGNMENT
    assert key not in held // needles.NUM_VALUES


def test_figures_table_and_picture(tmp_path) -> None:
    def result(loss: float, found: float) -> dict:
        rising = [loss] * (BUCKETS - 4) + [loss, loss, loss + 2, loss + 2]
        return {
            "loss": {"all": rising, "answers": rising},
            "found": {str(n): [found] * len(DEPTHS) for n in LENGTHS},
        }

    results = {
        "pretrain": result(3, 0),
        "yarn2": result(1, 1),
        "rope2": result(2, 0.5),
        "yarn1": result(1, 1),
    }
    assert late([9.0] * 12 + [1, 2, 3, 4]) == 2.5
    summary = summarise(results)
    assert (summary["late_loss_yarn"], summary["late_loss_rope"], summary["late_loss_before"]) == (2, 3, 4)
    assert (summary["found_at_2048_yarn"], summary["found_at_2048_rope"]) == (1, 0.5)
    assert "| no YaRN, both phases | 3.000 | 3.000 | 50% | 50% | 50% | 50% |" in table(results).splitlines()
    draw(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
