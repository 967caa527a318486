"""Our tasks: grades, figures, haystacks, programs; names and what is said of wrong ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.evaluation import catalog, grading, needle
from dsv3_megatron.evaluation.code import humaneval_problems, passed
from dsv3_megatron.evaluation.documents import choices, questions, written
from dsv3_megatron.evaluation.grading import CORRECT, INCORRECT, NOT_ATTEMPTED, by_match, parted
from dsv3_megatron.evaluation.run import figures, num_samples, run
from dsv3_megatron.evaluation.setting import Setting, use


class Says(LM):
    """A model that answers by a rule."""

    def __init__(self, answer: Any):
        super().__init__()
        self.answer = answer

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(self.answer(*request.args), True) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [self.answer(*request.args) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.answer(request.args[0]) for request in requests]


def result_of(task: str, answer: Any, limit: int | None = None) -> dict[str, float | None]:
    results = run(Says(answer), catalog.load_tasks([task]), limit=limit, bootstraps=0)  # type: ignore[arg-type]
    assert num_samples(results) == len(results["samples"][task])
    return {name.removesuffix(",none"): value for name, value in figures(results)[task].items()}


@pytest.mark.parametrize(
    ("answer", "right", "grade"),
    [
        ("Paris", ["Paris"], CORRECT),
        ("  the answer is PARIS. ", ["Paris"], CORRECT),
        ("The Atlantic", ["Atlantic"], CORRECT),
        ("1,440", ["1440", "1,440"], CORRECT),
        ("H₂O", ["H2O"], CORRECT),
        ("答案是：北京。", ["北京"], CORRECT),
        ("《史记》", ["史记"], CORRECT),
        ("Lyon", ["Paris"], INCORRECT),
        ("Paris or Lyon", ["Paris"], INCORRECT),
        ("parisian", ["Paris"], INCORRECT),
        ("", ["Paris"], NOT_ATTEMPTED),
        ("I don't know.", ["Paris"], NOT_ATTEMPTED),
        ("我不知道。", ["北京"], NOT_ATTEMPTED),
        ("?!", ["Paris"], NOT_ATTEMPTED),
    ],
)
def test_grades_by_match(answer, right, grade):
    assert by_match("", answer, right) == grade


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (" Paris\nConfidence: 80%", ("Paris", 0.8)),
        ("Paris, confidence 100", ("Paris", 1.0)),
        (" 北京\n把握：95％", ("北京", 0.95)),
        ("Paris", ("Paris", None)),
        ("Confidence: 12.5%\nParis", ("Paris", 0.125)),
        ("Paris\nConfidence: 900%", ("Paris", None)),
        ("", ("", None)),
    ],
)
def test_answer_and_confidence_are_parted(reply, expected):
    assert parted(reply) == expected


def test_figures_are_the_published_ones():
    """3 correct, 1 incorrect, 1 not attempted: F is the harmonic mean of 3/5 and 3/4."""
    items = [(1.0, 1.0)] * 3 + [(0.0, 1.0), (0.0, 0.0)]
    assert grading.correct_given_attempted(items) == 0.75
    assert grading.f_score(items) == pytest.approx(2 / (5 / 3 + 4 / 3))
    assert grading.f_score([(0.0, 0.0)] * 4) == grading.correct_given_attempted([(0.0, 0.0)]) == 0.0
    stated = [(0.95, 1.0), (0.95, 0.0), (0.15, 0.0), (None, 1.0), (1.0, 1.0)]
    high, low = 0.95 * 2 / 3 + 1 / 3, 0.15
    assert grading.calibration_error(stated) == pytest.approx((3 * abs(high - 2 / 3) + low) / 4)
    assert [row["num"] for row in grading.calibration(stated)] == [1, 3]
    assert math.isnan(grading.calibration_error([(None, 1.0)]))


def test_facts_through_the_harness():
    """Every second question right with 90%, every fourth declined."""
    known = {row["question"]: place for place, row in enumerate(questions("en"))}
    rows = questions("en")

    def answer(prompt: str) -> str:
        place = known[prompt.split("Question: ")[1].split("\n")[0]]
        if place % 2 == 0:
            return f" {rows[place]['answers'][-1]}\nConfidence: 90%"
        return " I don't know" if place % 4 == 1 else " nonsense\nConfidence: 60%"

    found = result_of("dsv3_facts_en", answer)
    assert found["correct"] == 0.5 and found["incorrect"] == found["not_attempted"] == 0.25
    assert found["correct_given_attempted"] == pytest.approx(2 / 3)
    assert found["f_score"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert found["calibration_error"] == pytest.approx((10 * 0.1 + 5 * 0.6) / 15)
    assert result_of("dsv3_facts_zh", lambda prompt: "不知道")["calibration_error"] is None


def test_repeated_facts_take_the_most_frequent_answer_and_its_share():
    """7 of 10 right for even questions, 6 of 10 wrong alike for odd ones."""
    rows = questions("en")
    known = {row["question"]: place for place, row in enumerate(rows)}
    asked = [0] * len(rows)

    def answer(prompt: str) -> str:
        place = known[prompt.split("Question: ")[1].split("\n")[0]]
        asked[place] += 1
        often = asked[place] <= (7 if place % 2 == 0 else 6)
        right = rows[place]["answers"][0]
        if place % 2 == 0:
            return f" {right.upper() if asked[place] % 2 else right}." if often else f" x{asked[place]}"
        return " nonsense" if often else f" {right}"

    found = result_of("dsv3_facts_en_repeated", answer)
    assert asked == [10] * len(rows)
    assert found["correct"] == found["incorrect"] == 0.5
    assert found["calibration_error"] == pytest.approx((0.3 + 0.6) / 2)


def test_grades_by_an_endpoint(endpoint):
    url, seen = endpoint
    grade = grading.by_endpoint(url, "judge", key="k")
    letters = {"A": CORRECT, "B": INCORRECT, "C": NOT_ATTEMPTED}
    for letter, expected in letters.items():
        assert grade("q?", f"letter {letter}", ["gold"]) == expected
    assert seen[0]["path"] == "/v1/chat/completions" and seen[0]["key"] == "Bearer k"
    assert seen[0]["model"] == "judge" and "gold" in seen[0]["messages"][0]["content"]
    assert grade("q?", " ", ["gold"]) == NOT_ATTEMPTED and len(seen) == 3  # nothing to ask
    with pytest.raises(RefusedArgument, match=r"replied ' Z\.' where one of A, B, C"):
        grade("q?", "letter Z", ["gold"])
    with pytest.raises(RefusedArgument, match=r"--grader http://127\.0\.0\.1:9/v1: does not answer"):
        grading.by_endpoint("http://127.0.0.1:9/v1", "judge", timeout_s=2)("q?", "x", ["gold"])


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("length", [64, 200, 1000])
def test_haystacks_have_their_length_and_the_needle_at_its_depth(length):
    for doc in needle.documents([length], [0, 25, 50, 75, 100], 2000, count):
        assert 0.75 * length < doc["tokens"] == count(doc["text"]) <= length
        assert doc["text"].count(doc["number"]) == 1
        hay, _, _ = doc["text"].partition("\n\nQuestion")
        before = count(hay[: hay.index(doc["number"])]) - 6  # words of the needle before its number
        assert 100 * before / count(hay) == pytest.approx(doc["depth"], abs=100 * 30 / count(hay))


def test_haystacks_by_default_fill_the_context():
    assert needle.lengths_up_to(1024) == (64, 128, 256, 512, 1000)
    assert needle.lengths_up_to(1 << 17)[-3:] == (1 << 15, 1 << 16, (1 << 17) - 24)
    assert needle.documents([100], [0], 2000, count) == needle.documents([100], [0], 2000, count)
    for lengths, depths, named in (
        ([990], [0], "has room for 976"),
        ([20], [0], "too few"),
        ([64], [101], "0 to 100"),
    ):
        with pytest.raises(RefusedArgument, match=named):
            needle.documents(lengths, depths, 1000, count)


def test_needles_through_the_harness_and_their_grid():
    use(Setting(max_length=1000, needle_lengths=(64, 200), needle_depths=(0, 100)))
    docs = needle.documents([64, 200], [0, 100], 1000, count)
    seen = {doc["text"]: doc["number"] for doc in docs if doc["length"] == 64}
    task = catalog.load_tasks(["dsv3_needle"])
    results = run(Says(lambda prompt: f" {seen.get(prompt, 'lost')}"), task, bootstraps=0)  # type: ignore[arg-type]
    assert figures(results)["dsv3_needle"]["found,none"] == 0.5
    assert needle.grid(results["samples"]["dsv3_needle"]) == ([64, 200], [0, 100], [[1.0, 0.0], [1.0, 0.0]])


def test_sets_are_sound():
    for language in ("en", "zh"):
        assert len(written(language)) == 6 and len(choices(language)) == 24 and len(questions(language)) == 20
        for row in choices(language):
            assert len(set(row["choices"])) == 4
        assert sorted(row["answer"] for row in choices(language)) == sorted([0, 1, 2, 3] * 6)
        for row in questions(language):
            assert by_match("", row["answers"][0], row["answers"]) == CORRECT
    right = {f"{row['question']} {row['choices'][row['answer']]}" for row in choices("en")}
    assert result_of("dsv3_choice_en", lambda c, e: -1.0 if c + e in right else -2.0)["acc"] == 1.0
    # One nat a byte, by definition.
    text = result_of("dsv3_text_zh", lambda text: -float(len(text.encode())))
    assert text["byte_perplexity"] == pytest.approx(math.e) and text["bits_per_byte"] == pytest.approx(
        1 / math.log(2)
    )


@pytest.mark.parametrize("num", [6, pytest.param(None, marks=pytest.mark.slow)])
def test_humaneval_s_own_solutions_pass(num):
    solutions = {problem["prompt"]: problem["canonical_solution"] for problem in humaneval_problems()}
    assert len(solutions) == 164
    assert result_of("dsv3_humaneval", solutions.get, limit=num) == {"pass@1": 1.0}


def test_programs_that_do_not_solve_it_fail():
    problem = humaneval_problems()[0]
    for completion in (
        "    return None\n",
        "",
        "    import os; os._exit(0)\n",
        "    raise SystemExit(0)\n",
        "    (\n",
    ):
        assert not passed(problem, completion), completion


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dsv3_needel", "did you mean dsv3_needle?"),
        ("arc_esy", "did you mean arc_easy?"),
        ("qqqqqqqqqqqq", "ours are dsv3_choice_en"),
    ],
)
def test_unknown_tasks_are_told_the_nearest(name, said):
    with pytest.raises(RefusedArgument) as refused:
        catalog.check_names(["dsv3_text_en", name])
    assert str(refused.value).startswith(f"--tasks {name}: no such task; {said}")
    assert "\n" not in str(refused.value)


def test_absent_data_is_named():
    with pytest.raises(
        RefusedArgument, match=r"^--tasks arc_easy: its data \(allenai/ai2_arc\) is not on this machine"
    ):
        catalog.load_tasks(["arc_easy"])


def test_a_standard_task_works_where_its_data_is(tmp_path: Path, monkeypatch):
    """ARC as the harness has it, over a folder that holds its data set."""
    folder = tmp_path / "allenai" / "ai2_arc"
    folder.mkdir(parents=True)
    row = {
        "id": "x", "question": "Ice is frozen", "answerKey": "A",
        "choices": {"text": ["water", "fire"], "label": ["A", "B"]},
    }  # fmt: skip
    files = []
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        files.append(f"  - split: {split}\n    path: {split}.jsonl\n")
    readme = "---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n" + "".join(files) + "---\n"
    (folder / "README.md").write_text(readme)
    monkeypatch.chdir(tmp_path)
    found = result_of("arc_easy", lambda context, ending: -float("fire" in ending))
    assert found["acc"] == 1.0


def test_names_are_split_and_each_counts_once():
    assert catalog.split_names(["a,b", "c", "a", ""]) == ["a", "b", "c"]
    with pytest.raises(RefusedArgument, match="names no task"):
        catalog.check_names([])
    with pytest.raises(RefusedArgument, match="--include-path nowhere"):
        catalog.check_names(["dsv3_text_en"], Path("nowhere"))


def test_tasks_of_the_user(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ncustom_dataset: !function data.rows\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: c\ndoc_to_target: a\nmetric_list:\n  - metric: acc\n'
    )
    (tmp_path / "data.py").write_text(
        "from datasets import Dataset\n\n\ndef rows(**unused):\n"
        "    return {'test': Dataset.from_list([{'q': 'x', 'c': ['y', 'z'], 'a': 1}])}\n"
    )
    loaded = catalog.load_tasks(["mine", "dsv3_choice_en"], tmp_path)
    assert list(loaded["tasks"]) == ["mine", "dsv3_choice_en"]
    mine = tmp_path / "mine.yaml"
    mine.write_text(mine.read_text().replace("metric: acc", "metric: no_such_metric"))
    with pytest.raises(
        RefusedArgument, match=r"^--tasks mine: cannot be loaded \(a metric of its metric_list"
    ):
        catalog.load_tasks(["mine"], tmp_path)
