"""`dsv3 generate`: its contract, in every layout, interrupted, and its errors."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Encoder

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.serve.generate import main
from dsv3_megatron.serve.output import Answers
from dsv3_megatron.serve.prompts import Prompt
from tests.harness import run_distributed
from tests.inference.models import prompts, transformers_greedy

KEYS = ["requests", "tokens", "tokens_per_s", "acceptance", "tokens_per_pass", "cache_bytes_per_token"]
NEW = 12


def write(file: Path, *lines: object) -> Path:
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return file


def words(folder: Path, questions: Path, output: Path, *more: str, kind: str = "--hf") -> list[str]:
    return [
        kind, str(folder), "--prompts", str(questions), "--output", str(output), "--device", "cpu",
        "--temperature", "0", "--max-new-tokens", str(NEW), "--json", *more,
    ]  # fmt: skip


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    return prompts(3, 41, 17, 1, 30, vocab_size=300)


@pytest.fixture(scope="module")
def questions(ids, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("prompts") / "ids.jsonl", *({"tokens": tokens} for tokens in ids))


@pytest.fixture(scope="module")
def wanted(hf, ids) -> list[list[int]]:
    return transformers_greedy(hf, ids, NEW)[0]


def test_the_contract(hf, ids, questions, wanted, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(words(hf, questions, output, "--ignore-eos", "--dtype", "fp32")) == 0
    *_, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert list(result) == KEYS
    assert result["requests"] == len(ids) and result["tokens"] == NEW * len(ids)
    assert result["tokens_per_s"] > 0 and result["acceptance"] is None and result["tokens_per_pass"] == 1
    assert result["cache_bytes_per_token"] == 3 * (16 + 8) * 4
    answers = read(output)
    assert [list(answer) for answer in answers] == [["prompt", "text", "tokens"]] * len(ids)
    assert [answer["prompt"] for answer in answers] == ids
    assert [answer["tokens"] for answer in answers] == wanted
    assert all(isinstance(answer["text"], str) for answer in answers)
    # The same command again finds all answers there.
    before = output.read_bytes()
    assert main(words(hf, questions, output, "--ignore-eos", "--dtype", "fp32")) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert output.read_bytes() == before
    assert again["tokens"] == result["tokens"] and again["tokens_per_s"] is None


def test_a_checkpoint_of_megatron_with_drafts_gives_the_same(checkpoint, questions, wanted, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    more = ("--ignore-eos", "--speculative", "mtp", "--max-batch", "2")
    assert main(words(checkpoint, questions, output, *more, kind="--load")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [answer["tokens"] for answer in read(output)] == wanted
    assert 0 <= result["acceptance"] <= 1 and result["tokens_per_pass"] == 1 + result["acceptance"]
    assert result["cache_bytes_per_token"] == 3 * (16 + 8) * 4  # of the model's layers, as without drafts


def test_text_in_and_out_in_bf16(hf, tmp_path, capsys):
    questions = write(tmp_path / "p.jsonl", {"prompt": "def add(first"}, {"prompt": "Name the\u2028function"})
    output = tmp_path / "out.jsonl"
    assert main(words(hf, questions, output, "--dtype", "bf16")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cache_bytes_per_token"] == 3 * 24 * 2
    answers = read(output)
    assert [answer["prompt"] for answer in answers] == ["def add(first", "Name the\u2028function"]
    from dsv3_megatron.serve.tokenizer import Tokenizer

    decode = Tokenizer(hf).decode
    assert [answer["text"] for answer in answers] == [decode(answer["tokens"]) for answer in answers]
    # A text with a line separator is one line still when the command goes on.
    assert main(words(hf, questions, output, "--dtype", "bf16")) == 0


def test_without_a_tokenizer_ids_are_enough(bare, tmp_path):
    questions = write(tmp_path / "p.jsonl", {"tokens": [5, 6]})
    assert main(words(bare, questions, tmp_path / "out.jsonl")) == 0
    (answer,) = read(tmp_path / "out.jsonl")
    assert answer["text"] is None and len(answer["tokens"]) == NEW


@pytest.mark.slow
def test_a_stop_string_ends_the_text_before_it(hf, questions, tmp_path):
    assert main(words(hf, questions, tmp_path / "plain.jsonl", "--ignore-eos")) == 0
    plain = read(tmp_path / "plain.jsonl")
    stop = plain[1]["text"][4:6]
    more = ("--ignore-eos", "--stop", stop)
    assert main(words(hf, questions, tmp_path / "stopped.jsonl", *more)) == 0
    for whole, stopped in zip(plain, read(tmp_path / "stopped.jsonl"), strict=True):
        text = whole["text"]
        assert stopped["text"] == (text[: text.index(stop)] if stop in text else text)


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_answers(hf, questions, tmp_path):
    """Sampled ones: a request's random numbers depend on its number, not on what ran beside it."""
    sampled = ("--temperature", "0.9", "--seed", "7")
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert main(words(hf, questions, whole, *sampled)) == 0
    assert main(words(hf, questions, cut, *sampled)) == 0
    content = whole.read_bytes()
    second = content.index(b"\n", content.index(b"\n") + 1)
    cut.write_bytes(content[: second + 20])  # two lines and a part of the third
    assert main(words(hf, questions, cut, *sampled)) == 0
    assert cut.read_bytes() == content
    other = tmp_path / "other.jsonl"
    assert main(words(hf, questions, other, "--temperature", "0.9", "--seed", "8")) == 0
    assert other.read_bytes() != content  # the control


def test_lines_that_are_there_are_kept(tmp_path):
    questions = [Prompt("a\u2028b", [1]), Prompt("c", [2]), Prompt("d", [3])]
    answers = Answers(tmp_path / "out.jsonl", questions, {"seed": 0})
    answers.add(1, "second", [7, 8])
    assert answers.done == 0  # lines come in the order of the prompts
    answers.add(0, "first\u2028", [9])
    assert answers.done == 2
    answers.close()
    with open(tmp_path / "out.jsonl", "a") as file:
        file.write('{"prompt": "d", "te')
    again = Answers(tmp_path / "out.jsonl", questions, {"seed": 0})
    assert (again.done, again.num_tokens) == (2, 3)
    again.add(2, "third", [])
    again.close()
    assert [answer["text"] for answer in read(tmp_path / "out.jsonl")] == ["first\u2028", "second", "third"]


def generate_on_rank(rank: int, world_size: int, argv: list[str]) -> int:
    return main(argv)


LAYOUTS = {
    "TP2": (2, ("--tensor-model-parallel-size", "2")),
    "EP2": (2, ("--expert-model-parallel-size", "2")),
    "EP4": (4, ("--expert-model-parallel-size", "4")),
    "PP2": (2, ("--pipeline-model-parallel-size", "2")),
    "TP2 EP2 DP2": (4, ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2")),
    "PP2 EP2": (4, ("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2")),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "TP2"]
# Deployments as in the report's §3.4 in small: 8 routed experts, and slots for copies.
EP4 = (
    "--tensor-model-parallel-size",
    "2",
    "--expert-model-parallel-size",
    "4",
    "--mlp-tensor-parallel-size",
    "1",
)
DEPLOYMENTS = {
    "prefill": (
        *EP4,
        "--redundant-experts",
        "4",
        "--rebalance-interval",
        "3",
        "--microbatches",
        "2",
        "--max-batch",
        "2",
    ),
    "decode": (*EP4, "--redundant-experts", "8", "--shared-expert-as-routed", "--rebalance-interval", "2"),
}


@pytest.mark.parametrize("drafts", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["TP2", *SLOW])
def test_every_layout_gives_the_tokens_of_one_process(
    checkpoint, questions, wanted, layout, drafts, tmp_path
):
    """With sequence parallelism where there is tensor parallelism; more data-parallel ranks than some windows fill."""
    size, options = LAYOUTS[layout]
    output = tmp_path / "out.jsonl"
    more = ("--ignore-eos", *options, *(("--speculative", "mtp") if drafts else ()))
    argv = words(checkpoint, questions, output, *more, kind="--load")
    assert run_distributed(generate_on_rank, size, init=False, argv=argv) == [0] * size
    assert [answer["tokens"] for answer in read(output)] == wanted


@pytest.mark.parametrize("kind", ["--hf", pytest.param("--load", marks=pytest.mark.slow)])
@pytest.mark.parametrize("drafts", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("deployment", ["prefill", pytest.param("decode", marks=pytest.mark.slow)])
def test_a_deployment_gives_the_tokens_of_one_process(
    hf, checkpoint, questions, wanted, deployment, drafts, kind, tmp_path
):
    """TP2 with sequence parallelism, DP2, EP4, whole MLPs, copies of experts that move while answers are written."""
    output = tmp_path / "out.jsonl"
    more = ("--ignore-eos", *DEPLOYMENTS[deployment], *(("--speculative", "mtp") if drafts else ()))
    argv = words(hf if kind == "--hf" else checkpoint, questions, output, *more, kind=kind)
    assert run_distributed(generate_on_rank, 4, init=False, argv=argv) == [0] * 4
    assert [answer["tokens"] for answer in read(output)] == wanted


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("nonsense", "p.jsonl:2: not JSON"),
        ("[" * 100_000, "p.jsonl:2: not JSON"),
        ('{"prompt": "\\ud800"}', "p.jsonl:2: not JSON ('utf-8'"),
        ('{"text": "x"}', 'p.jsonl:2: give {"prompt": text or messages}'),
        ('{"prompt": "x", "tokens": [1]}', "p.jsonl:2: give"),
        ('{"prompt": 5}', "p.jsonl:2: prompt must be a text"),
        ('{"tokens": [1, 300]}', "p.jsonl:2: token 300"),
        ('{"tokens": [1.5]}', "p.jsonl:2: tokens must be a list"),
        ('{"prompt": "x", "max_tokens": 5}', "p.jsonl:2: 'max_tokens' would do nothing"),
        ('{"tokens": []}', "p.jsonl:2: the prompt is empty"),
        ('{"tokens": ' + str([1] * 128) + "}", "p.jsonl:2: 128 tokens leave no room"),
    ],
)
def test_wrong_lines_are_named(hf, line, named, tmp_path, capsys):
    questions = tmp_path / "p.jsonl"
    questions.write_text('{"tokens": [1]}\n' + line + "\n")
    refused(words(hf, questions, tmp_path / "out.jsonl"), named, capsys)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--temperature", "-1"), "--temperature -1"),
        (("--temperature", "inf"), "--temperature inf"),
        (("--temperature", "nan"), "--temperature nan"),
        (("--cache-gb", "-1"), "--cache-gb -1.0: must be a number above 0"),
        (("--cache-gb", "nan"), "--cache-gb nan"),
        (("--cache-gb", "1e9"), "GiB are free; use a smaller one"),
        (("--redundant-experts", "-1"), "--redundant-experts -1"),
        (("--redundant-experts", "3", "--expert-model-parallel-size", "2"), "do not lie evenly on 2"),
        (("--rebalance-interval", "5"), "--rebalance-interval 5: 0 or more, and with --redundant-experts"),
        (("--shared-expert-as-routed",), "needs a redundant slot"),
        (("--top-p", "0"), "--top-p 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("--max-length", "500"), "--max-length 500"),
        (("--max-length", "0"), "--max-length 0"),
        (("--cache-gb", "1000000"), "--cache-gb 1e+06: "),
        (("--transformer-impl", "transformer_engine"), "use --transformer-impl local"),
        (("--max-batch", "0"), "--max-batch 0"),
        (("--expert-model-parallel-size", "3"), "--expert-model-parallel-size 3"),
        (("--tensor-model-parallel-size", "2"), "processes"),
        (("--load", "nowhere"), "give --load DIR"),
        (("--tokenizer", "nowhere"), "--tokenizer nowhere"),
    ],
)
def test_wrong_options_are_named(hf, questions, more, named, tmp_path, capsys):
    refused(words(hf, questions, tmp_path / "out.jsonl", *more), named, capsys)


def test_wrong_models_are_named(bare, questions, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    text = write(tmp_path / "p.jsonl", {"prompt": "x"})
    refused(words(bare, text, output), "needs a tokenizer", capsys)
    refused(words(bare, questions, output, "--speculative", "mtp"), "--speculative mtp", capsys)
    refused(words(tmp_path / "nowhere", questions, output), "--hf", capsys)
    refused(words(tmp_path / "nowhere", questions, output, kind="--load"), "--load", capsys)
    (tmp_path / "empty").mkdir()
    refused(words(tmp_path / "empty", questions, output), "empty: no config.json in it; a Megatron", capsys)
    refused(words(tmp_path / "empty", questions, output, kind="--load"), "empty", capsys)
    ids = write(tmp_path / "ids.jsonl", {"tokens": [1]})
    refused(words(bare, ids, tmp_path / "none" / "out.jsonl"), "make its folder first", capsys)


def test_a_batch_larger_than_memory_is_as_large_as_the_cache(hf, questions, wanted, tmp_path):
    more = (
        "--ignore-eos",
        "--cache-gb",
        "0.01",
        "--max-batch",
        "1000000000",
        "--max-step-tokens",
        "1000000000",
    )
    assert main(words(hf, questions, tmp_path / "out.jsonl", *more)) == 0
    assert [answer["tokens"] for answer in read(tmp_path / "out.jsonl")] == wanted


@pytest.mark.parametrize("value", ["one", [1, None], True])
def test_ends_that_are_no_ids_are_named(bare, questions, value, tmp_path, capsys):
    folder = shutil.copytree(bare, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    refused(words(folder, questions, tmp_path / "out.jsonl"), f"eos_token_id {value!r}: must be", capsys)


def test_a_tokenizer_beyond_the_vocabulary_is_refused(hf, questions, tmp_path, capsys):
    larger = Encoder.from_file(str(hf / "tokenizer.json"))
    larger.add_tokens(["beyond"])
    larger.save(str(tmp_path / "tokenizer.json"))
    more = ("--tokenizer", str(tmp_path))
    refused(words(hf, questions, tmp_path / "out.jsonl", *more), "has ids up to 300, the vocabulary", capsys)


def test_files_of_another_job_are_refused(hf, questions, tmp_path, capsys):
    output = write(tmp_path / "out.jsonl", {"prompt": "x"})
    refused(words(hf, questions, output), "was not written by this command", capsys)
    Answers(tmp_path / "b.jsonl", [Prompt("x", [1])], {"seed": 1}).add(0, None, [])
    with pytest.raises(ValueError, match="seed 1 there, 2 asked"):
        Answers(tmp_path / "b.jsonl", [Prompt("x", [1])], {"seed": 2})
    with pytest.raises(ValueError, match=r"b\.jsonl:1: answers another prompt"):
        Answers(tmp_path / "b.jsonl", [Prompt("y", [1])], {"seed": 1})


@pytest.mark.parametrize("line", [b"{garbage", b"[1]", b"{}", b'{"prompt": "x", "tokens": null}', b"\xff"])
def test_a_line_that_is_no_answer_is_refused_and_kept(line, tmp_path):
    output, questions = tmp_path / "out.jsonl", [Prompt("x", [1])]
    Answers(output, questions, {"seed": 1}).close()
    output.write_bytes(line + b"\n")
    with pytest.raises(RefusedArgument, match=r"out\.jsonl:1: is no answer"):
        Answers(output, questions, {"seed": 1})
    assert output.read_bytes() == line + b"\n"


def test_a_full_disk_is_one_line_and_the_job_goes_on(tmp_path):
    output, questions = tmp_path / "out.jsonl", [Prompt("x", [1]), Prompt("y", [2])]
    answers = Answers(output, questions, {"seed": 1})
    answers.add(0, "first", [7])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (output.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(RefusedArgument, match="File too large; make room, and the same command"):
            answers.add(1, "second", [8])
        answers.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = Answers(output, questions, {"seed": 1})
    assert again.done == 1
    again.add(1, "second", [8])
    again.close()
    assert [answer["text"] for answer in read(output)] == ["first", "second"]


def test_what_is_no_file_is_no_output():
    with pytest.raises(RefusedArgument, match="--output /dev/full: is no file"):
        Answers(Path("/dev/full"), [Prompt("x", [1])], {"seed": 1})


def test_settings_that_are_none_are_refused(tmp_path):
    output = write(tmp_path / "out.jsonl", {"prompt": "x"})
    (tmp_path / "out.jsonl.settings.json").write_text("[1]")
    with pytest.raises(RefusedArgument, match="was not written by this command"):
        Answers(output, [Prompt("x", [1])], {"seed": 1})


def test_another_tokenizer_is_another_job(hf, tmp_path, capsys):
    questions, output = write(tmp_path / "p.jsonl", {"prompt": "Name"}), tmp_path / "out.jsonl"
    assert main(words(hf, questions, output)) == 0
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    shutil.copy(hf / "tokenizer.json", tmp_path / "other")
    refused(
        words(hf, questions, output, "--tokenizer", str(tmp_path / "other")), "tokenizer None there", capsys
    )


def refused(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names it, status 2."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    *_, line = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and named in line, line


@pytest.mark.slow
def test_as_a_command(hf, questions, wanted, tmp_path):
    output = tmp_path / "out.jsonl"
    argv = words(hf, questions, output, "--ignore-eos")
    ran = subprocess.run(
        [sys.executable, "-m", "dsv3_megatron", "generate", *argv], capture_output=True, text=True, check=True
    )
    assert list(json.loads(ran.stdout.splitlines()[-1])) == KEYS and ran.stdout.count("\n") == 1
    assert [answer["tokens"] for answer in read(output)] == wanted
    assert "generate 5 of 5 answers" in ran.stderr and "Warning" not in ran.stderr
