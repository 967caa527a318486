"""Final answers, formats, programs, generated tasks and proofs: what is right scores, what only looks so does not."""

import json
import os
import stat
import threading
import time

import pytest

from dsv3_megatron import rewards
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.rewards.extract import boxed_contents, final_answer
from dsv3_megatron.rewards.formula import NotMath, parse
from dsv3_megatron.rewards.symbolic import equal

answer, code = rewards.resolve("answer"), rewards.resolve("code")


@pytest.mark.parametrize(
    "left, right",
    [
        ("1/2", "0.5"), (r"\frac12", r"\dfrac{1}{2}"), ("1,234,567", "1234567"), (r"$3\pi$", "3*pi"), ("x=5", "5"),
        ("(x+1)^2", "x^2+2x+1"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"\sqrt[3]{8}", "2"), (r"\{1, 2\}", r"\{2,1\}"),
        ("1, 2", "2, 1"), ("(1/2, 3)", "(0.5, 3)"), ("y = 2x", "2x - y = 0"), ("Yes", "yes"), (r"1\frac{1}{2}", "3/2"),
        (r"\sin^2 x + \cos^2 x", "1"), (r"\frac{\pi}{4}", r"\arctan 1"), ("10\\%", "10"), (r"90^\circ", "90"),
        (r"\text{east}", "East"), ("-0", "0"), ("5!", "120"), (r"\binom{5}{2}", "10"), (r"\log_2 8", "3"),
        ("2^{10}", "1024"), (r"\left(0, 1\right]", "(0,1]"), ("|-3|", "3"), (r"\infty", "oo"), ("e^{i\\pi}", "-1"),
        ("007", "7"), ("x_{1}+y", "y+x_1"),
    ],
)  # fmt: skip
def test_equal(left, right):
    assert equal(left, right) and equal(right, left)


@pytest.mark.parametrize(
    "left, right",
    [
        ("0.333", "1/3"), ("3.14159265358979", r"\pi"), ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), (r"\{1,1\}", r"\{1\}"),
        ("x+1", "x-1"), ("12", "1 2"), ("1/0", "1"), ("", ""), ("", "0"), ("4 or 5", "4"), ("x^2", "2x"),
        (r"\frac{1}{2", "1/2"), ("y=2x", "y=3x"), ("1e400", "inf"), ("nan", "nan2"), ("True", "1"), ("x", "X+0*y"),
    ],
)  # fmt: skip
def test_not_equal(left, right):
    assert not equal(left, right) and not equal(right, left)


@pytest.mark.parametrize(
    "prompt, response, value",
    [
        ("What is it?", "<think>it is so</think> <answer>4</answer>", 1.0),
        ("What is it?", "<think>这是 it so</think> <answer>4</answer>", 0.5),
        ("你是谁", "我是 a bot", 0.5),
        ("привет", "мир peace", 0.5),
        ('[{"role": "user", "content": "你是谁"}]', "hello 我", 0.5),
        ("What is it?", "mиx", 0.0),
        ("406", "any word", 1.0),
        ("What is it?", "789", 1.0),
        ("true", "", 1.0),
    ],
)
def test_language_is_the_share_of_words_in_the_prompts_scripts(prompt, response, value):
    assert rewards.resolve("language")(prompt, response, None) == value


@pytest.mark.parametrize(
    "attack",
    [
        "9**9**9**9", "9^(9^(9^9))", "2^{2^{2^{2^{2^{2}}}}}", "((((" * 200 + "1", "1" * 400, "10000000!", "5!!!!!!",
        "__import__('os').system('touch /tmp/owned')", "().__class__.__bases__", "lambda: 0", "exec('1')",
        r"\binom{10^{20}}{10^{19}}", "(" * 39 + "x" + ")" * 39, "sin(" * 60 + "1" + ")" * 60, "x" * 499,
        "(x+1)^200*(x+2)^200*(x+3)^200*(x+y+z)^200 - 7", "\x00", "\ud800", "٣", "1+" * 240 + "1",
    ],
)  # fmt: skip
def test_a_hostile_answer_costs_bounded_time_and_runs_nothing(attack):
    begin = time.monotonic()
    assert not equal(attack, "(x+1)^{199}*y") and not equal(attack, "1234")
    assert time.monotonic() - begin < 10


def test_symbolic_comparison_without_an_alarm_on_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(equal("(x+1)^2", "x^2+2x+1")))
    thread.start()
    thread.join()
    assert found == [True]
    with pytest.raises(NotMath):
        parse("hello world")


@pytest.mark.parametrize(
    "response, found",
    [
        ("<think>\\boxed{1}</think> <answer>2</answer>", "2"),
        ("<think>a</think><answer>so \\boxed{\\frac{1}{2}}</answer>", "\\frac{1}{2}"),
        ("<think>so \\boxed{1}", None),
        ("It is \\boxed{3}, no: \\boxed{4}.", "4"),
        ("reasons\nThe answer is 12.", "12."),
        ("a = 3\n#### 72", "72"),
        ("", None),
        ("\\boxed{cut", "\\boxed{cut"),
    ],
)
def test_final_answer(response, found):
    assert final_answer(response) == found


def test_boxes_keep_their_braces():
    assert boxed_contents(r"\boxed{\{1, 2\}} and \boxed{a{b}c} \boxed{cut") == [r"\{1, 2\}", "a{b}c"]


def test_answer_reward():
    assert answer("q", "<think>?</think> <answer>$x = \\frac{1}{2}$</answer>", "0.5") == 1.0
    assert answer("q", "<think>?</think> <answer>0.6</answer>", "0.5") == 0.0
    assert answer("q", "7", 7) == 1.0 and answer("q", "8", ["7", "8"]) == 1.0
    assert answer("q", "72", "so it is\n#### 72") == 1.0
    assert (
        rewards.resolve("boxed")("q", "7", "7") == 0.0
        and rewards.resolve("boxed")("q", "\\boxed{7}", "7") == 1.0
    )
    for wrong in ("", None, [], True, {"a": 1}):
        with pytest.raises(ValueError):
            answer("q", "7", wrong)


@pytest.mark.parametrize(
    "prompt, response, value",
    [
        ("", "<think>a</think> <answer>b</answer>", 1.0),
        ("", " <think>a\nb</think>\n<answer>b</answer>\n", 1.0),
        ("… <think>\n", "a</think> <answer>b</answer>", 1.0),
        ("", "a</think> <answer>b</answer>", 0.0),
        ("", "<think>a</think> <answer>b</answer> c", 0.0),
        ("", "<think></think> <answer>b</answer>", 0.0),
        ("", "<think>a</think><think>a</think> <answer>b</answer>", 0.0),
        ("", "<think>a <answer>x</answer></think> <answer>b</answer>", 0.0),
        ("", "<answer>b</answer> <think>a</think>", 0.0),
    ],
)
def test_format_of_r1(prompt, response, value):
    assert rewards.resolve("format")(prompt, response, None) == value


def test_other_formats():
    regular, once = rewards.resolve("regular"), rewards.resolve("boxed-format")
    assert regular("", " 12-34\n", r"\d+-\d+") == 1.0 and regular("", "12-34 x", r"\d+-\d+") == 0.0
    with pytest.raises(ValueError, match="no regular expression"):
        regular("", "", "(")
    assert [once("", text, None) for text in ("\\boxed{1}", "\\boxed{1}\\boxed{1}", "\\boxed{}", "")] == [
        1,
        0,
        0,
        0,
    ]


def test_code_reward():
    tests = {"tests": ["assert f(2) == 4", "assert f(3) == 9"]}
    right = "<think>…</think> <answer>```python\ndef f(x):\n    return x * x\n```</answer>"
    half = "```python\ndef f(x): return 4\n```"
    assert code("", right, tests) == 1.0 and code("", half, tests) == 0.0
    assert rewards.resolve("code-fraction")("", half, tests) == 0.5
    assert code("", "I cannot.", tests) == 0.0 and code("", "", tests) == 0.0
    assert code("", "import os\ndef f(x): return x * x\nos._exit(0)", tests) == 0.0
    assert code("", "    return x * x", {"tests": "assert f(5) == 25", "before": "def f(x):\n"}) == 1.0
    cases = {"cases": [{"input": "1 2\n", "output": "3"}]}
    adder = "import sys\na, b = map(int, input().split())\nprint(a + b)\nsys.exit()"
    assert code("", adder, cases) == 1.0 and code("", "print(4)", cases) == 0.0
    for wrong in (
        None,
        {},
        {"tests": []},
        {"tests": "x", "cases": []},
        {"tests": "x", "seconds": -1},
        {"test": "x"},
    ):
        with pytest.raises(ValueError):
            code("", right, wrong)


PROBLEM = {
    "declare": "(declare-const x Int) (declare-const y Int)",
    "assume": ["(> x 3)", "(= y (+ x 1))"],
    "goal": "(> (* x y) 12)",
}


@pytest.mark.parametrize(
    "response, value",
    [
        ("<think>…</think> <answer>(>= x 4) (>= y 5) (> (* x y) 12)</answer>", 1.0),
        ("```smt\n(>= y 5)\n(> (* x y) 12)\n```", 1.0),
        ("(>= x 5) (> (* x y) 12)", 0.0),  # a step that does not follow
        ("(>= y 5)", 0.0),  # not the goal
        ("false (> (* x y) 12)", 0.0),
        ("(= x x)) (assert false", 0.0),
        ("(> (* x y) 12) ; proved", 0.0),
        ("(assert false) (> (* x y) 12)", 0.0),
        ("(> z 1) (> (* x y) 12)", 0.0),
        ("", 0.0),
    ],
)
def test_a_proof_in_steps(response, value):
    pytest.importorskip("z3")
    assert rewards.resolve("smt")("", response, PROBLEM) == value


def test_a_hard_goal_needs_its_lemmas_and_a_bad_problem_is_the_datas_fault():
    pytest.importorskip("z3")
    smt = rewards.resolve("smt")
    hard = {"declare": "(declare-const a Int) (declare-const b Int) (declare-const c Int)", "work": 3000,
            "goal": "(=> (and (> a 2) (> b a) (> c b)) (> (* a b c) 59))"}  # fmt: skip
    goal = hard["goal"]
    assert smt("", goal, hard) == 0.0  # "unknown" is not proved
    assert smt("", goal, {**hard, "work": 10_000_000}) == 1.0
    with pytest.raises(ValueError, match="contradict"):
        smt("", "(> x 3)", {**PROBLEM, "assume": ["(> x 3)", "(< x 2)"]})
    for wrong in (
        {"goal": "(> q 1)"},
        {"goal": 3},
        {"goal": "true", "declare": "(assert false)"},
        {"goal": "true)(x"},
    ):
        with pytest.raises(ValueError):
            smt("", "true", wrong)


def test_a_generated_task():
    pytest.importorskip("reasoning_gym")
    from dsv3_megatron.rewards.gym import problems

    lines = [json.loads(json.dumps(line)) for line in problems("basic_arithmetic", 3, seed=1)]
    gym = rewards.resolve("gym")
    for line in lines:
        right = line["answer"]["entry"]["answer"]
        assert gym(line["prompt"], f"<think>a</think> <answer>{right}</answer>", line["answer"]) == 1.0
        assert gym(line["prompt"], "<think>a</think> <answer>wrong</answer>", line["answer"]) < 0.1
        assert gym(line["prompt"], "", line["answer"]) == 0.0
    with pytest.raises(RefusedArgument, match="no_such_task"):
        list(problems("no_such_task", 1))
    with pytest.raises(ValueError, match="must be"):
        gym("", "", "7")


STATEMENT = {"statement": "theorem two (n : Nat) : n + 0 = n"}


def test_without_lean_the_reward_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("DSV3_LEAN", raising=False)
    with pytest.raises(RefusedArgument, match="needs Lean 4"):
        rewards.resolve("lean")


def test_what_is_asked_of_lean(tmp_path, monkeypatch):
    """A stand-in for the command: it accepts `rfl`, and reports an axiom for `simp`."""
    program = tmp_path / "toolchain" / "bin" / "lean"
    program.parent.mkdir(parents=True)
    program.write_text(
        "#!/bin/sh\nmark=$(sed -n 's/#print axioms //p' $1)\n"
        'grep -q "^theorem $mark (n : Nat) : n + 0 = n" $1 || exit 1\n'
        "if [ -r /etc/passwd ] && cat /etc/passwd > /dev/null; then exit 1; fi\n"
        "if grep -q simp $1; then echo \"'$mark' depends on axioms: [propext, own]\"; exit 0; fi\n"
        "if grep -q omega $1; then echo \"'$mark' depends on axioms: [propext,\n Quot.sound]\"; exit 0; fi\n"
        "grep -q rfl $1 && echo \"'$mark' does not depend on any axioms\"\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("DSV3_LEAN", str(program))
    monkeypatch.setattr("dsv3_megatron.rewards.lean.TOOLS", ("/bin", "/usr/bin"))
    lean = rewards.resolve("lean")
    assert lean("", "rfl", STATEMENT) == 1.0
    assert lean("", "<think>a</think> <answer>```lean4\nomega\n```</answer>", STATEMENT) == 1.0
    assert lean("", "simp", STATEMENT) == 0.0  # an axiom of its own
    assert lean("", "ring", STATEMENT) == 0.0  # refused
    assert lean("", "sorry", STATEMENT) == 0.0
    assert lean("", "rfl\n#eval IO.println \"'dsv3' does not depend on any axioms\"", STATEMENT) == 0.0
    with pytest.raises(ValueError):
        lean("", "rfl", {"statement": "n + 0 = n"})
    assert os.listdir(tmp_path) == ["toolchain"]
