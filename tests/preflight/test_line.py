"""Launch lines as people write them, the command around the check, and machines as data: no Megatron."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.arguments.requirements import TE, USES, has_symbol, lacking
from dsv3_megatron.arguments.surroundings import max_connections
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.preflight import __main__ as command
from dsv3_megatron.preflight import check
from dsv3_megatron.preflight.findings import Finding, from_megatron, from_message
from dsv3_megatron.preflight.line import read
from dsv3_megatron.preflight.machine import GPUS, USAGE, Machine

ARGUMENTS = ("--spec", "dsv3", "--bf16")


@pytest.mark.parametrize(
    ("line", "trainer", "nodes", "per_node"),
    [
        ("torchrun --nnodes 4 --nproc-per-node 8 -m dsv3_megatron.train --spec dsv3 --bf16", "train", 4, 8),
        ("torchrun --nproc_per_node=2 --standalone -m dsv3_megatron train --spec dsv3 --bf16", "train", 1, 2),
        ("python -m torch.distributed.run --nnodes 2:2 --nproc-per-node 8 -m dsv3_megatron.train --spec dsv3 --bf16",
         "train", 2, 8),
        ("srun --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc-per-node gpu -m dsv3_megatron.train --spec dsv3 --bf16",
         "train", 2, None),
        ("torchrun --nproc-per-node 8 /opt/Megatron-LM/pretrain_gpt.py --spec dsv3 --bf16", "pretrain_gpt", 1, 8),
        ("dsv3 train --spec dsv3 --bf16", "train", None, None),
        ("--spec dsv3 --bf16", "train", None, None),
    ],
)  # fmt: skip
def test_every_form(line: str, trainer: str, nodes: int | None, per_node: int | None) -> None:
    for words in (line.split(), [line]):
        found = read(words)
        assert (found.trainer, found.nodes, found.per_node) == (trainer, nodes, per_node)
        assert found.words == ARGUMENTS


def test_hydra_lines_and_variables() -> None:
    overrides = ("model=v3_671b", "layout=pp16_ep64")
    for line in (
        "torchrun -m dsv3_megatron.train_hydra",
        "python -m dsv3_megatron.train_hydra",
        "dsv3 train-hydra",
        "",
    ):
        found = read(["NCCL_DEBUG=INFO", *line.split(), *overrides])
        assert found.trainer == "hydra" and found.words == overrides and found.env == {"NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "no launch line"),
        ("torchrun --nproc-per-node 0 -m dsv3_megatron.train", "--nproc-per-node 0: no number of GPUs"),
        ("torchrun --nproc-per-node -2 -m dsv3_megatron.train", "--nproc-per-node -2: no number of GPUs"),
        ("torchrun --nproc-per-node cpu -m dsv3_megatron.train", "--nproc-per-node cpu: no number of GPUs"),
        ("torchrun --nnodes 0 -m dsv3_megatron.train", "--nnodes 0: no number of machines"),
        ("torchrun --nnodes 3:2 -m dsv3_megatron.train", "--nnodes 3:2: no number of machines"),
        ("torchrun --nnodes 2: -m dsv3_megatron.train", "--nnodes 2:: no number of machines"),
        ("torchrun --help", "torchrun: it would print its help"),
        ("torchrun -m dsv3_megatron.train --bf16 && torchrun -m dsv3_megatron.train", "'&&' is the shell's"),
        (
            "torchrun -m dsv3_megatron.train --bf16; torchrun -m dsv3_megatron.train",
            "'--bf16;' is the shell's",
        ),
        ("torchrun -m dsv3_megatron.train --bf16 2>&1 | tee log", "'2>&1' is the shell's"),
        ("python train.py --spec dsv3", "starts no trainer of ours"),
        ("torchrun --nnodes some -m dsv3_megatron.train", "--nnodes some"),
        ("torchrun --nproc-per-node 8", "torchrun:"),
        ("torchrun --no-such-option 3 -m other", "torchrun:"),
    ],
)
def test_a_line_that_cannot_be_read(line: str, says: str) -> None:
    with pytest.raises(RefusedArgument, match=says):
        read(line.split())
    with pytest.raises(RefusedArgument, match=says):
        read([line])  # as one word


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([""], "no launch line"),
        (["  ", ""], "no launch line"),
        (["\n"], "no launch line"),
        (["torchrun --nnodes 'two"], "launch line: No closing quotation. Use a whole line"),
    ],
)
def test_no_line(words: list[str], says: str) -> None:
    with pytest.raises(RefusedArgument, match=says):
        read(words)


def test_names_in_front_of_the_launcher() -> None:
    """What is nearly a name of ours is a mistake; anything else would be the shell's variable, and is said."""
    line = "torchrun --nnodes 2 --nproc-per-node 8 -m dsv3_megatron.train --spec dsv3 --bf16"
    for words, says in (
        ("host_memmory=100", "host_memmory=100: no such name. Use host_memory=100"),
        ("gpu_per_node=8", "gpu_per_node=8: no such name. Use gpus_per_node=8"),
        ("NCCL_DEBUG=INFO outputs=json", "outputs=json: no such name. Use output=json"),
    ):
        with pytest.raises(RefusedArgument, match=says):
            read([*words.split(), *line.split()])
    found = read(["http_proxy=there", *line.split()])
    assert found.words == ARGUMENTS and found.env == {"http_proxy": "there"}
    assert found.notes[0].startswith(
        "http_proxy=there: taken for a variable of the job; names of ours are te,"
    )
    with pytest.raises(RefusedArgument, match="starts no trainer of ours"):
        read(["model=tiny", "layout=cpu_single", "nonsense"])


@pytest.mark.parametrize("text", ["", "many", "-1", "8.0", "²"])
def test_queues_that_are_no_number(text: str) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    with pytest.raises(RefusedArgument, match=f"^{name}={text}: no number. Use {name}=32"):
        max_connections({name: text})
    assert max_connections({}) == 8 and max_connections({name: "1"}) == 1


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_a_job_that_would_print_its_options(word: str) -> None:
    line = read(["torchrun", "-m", "dsv3_megatron.train", "--spec", "dsv3", word])
    with pytest.raises(RefusedArgument, match=f"^{word}: the job would print its options and end. Use the"):
        check.job_of(line, Machine())


def test_what_nobody_foresaw_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("integer modulo by zero in num_layers_at_end")

    monkeypatch.setattr(check, "_completed", fail)
    [*_, finding] = check.examine(read(["--spec", "dsv3"]), Machine())
    assert finding.severity == "error" and "integer modulo by zero" in finding.why


def test_a_line_may_go_on_after_a_backslash() -> None:
    found = read(
        ["torchrun --nnodes 4 \\\n  --nproc-per-node 8 \\\n -m dsv3_megatron.train --spec dsv3 --bf16"]
    )
    assert found.words == ARGUMENTS and (found.nodes, found.per_node) == (4, 8)


@pytest.mark.parametrize(
    "words",
    [
        {"te": "new"},
        {"apex": "yes"},
        {"gpu": "h900"},
        {"nodes": "0"},
        {"gpus_per_node": "x"},
        {"host_memory": "big"},
        {"host_memory": "-3"},
        {"host_memory": "nan"},
        {"torch": "absent"},
        {"cuda": "new"},
        {"deepep": ""},
    ],
)
def test_a_machine_that_is_none(words: dict[str, str]) -> None:
    [name] = words
    with pytest.raises(RefusedArgument, match=f"^{name}={words[name]}: ") as refused:
        Machine.of(words)
    [finding] = from_message(str(refused.value))
    assert finding.argument == f"{name}={words[name]}" and finding.use


def test_the_page_lists_what_can_be_said() -> None:
    page = (Path(__file__).parents[2] / "docs" / "preflight.md").read_text()
    assert all(f"`{name}`" in page for name in (*USAGE, *GPUS, "output"))


def test_our_words_may_stand_anywhere_and_collide_with_none() -> None:
    from dsv3_megatron.conf import groups

    said, line = command._split(["--", "te=2.12", "torchrun", "-m", "x", "model=tiny", "output=json"])
    assert said == {"te": ["2.12"], "output": ["json"]} and line == ["torchrun", "-m", "x", "model=tiny"]
    assert not set(USAGE) & set(groups())
    from dsv3_megatron.arguments import megatron_parser

    names = {o.lstrip("-").replace("-", "_") for a in megatron_parser()._actions for o in a.option_strings}
    assert not (set(USAGE) | {"output"}) & names


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        ("2.7", {use.key for use in USES if use.package == TE}),
        ("2.8.0", {"bf16_moments_in_place"}),
        ("2.12.0", {"bf16_moments_in_place"}),
        ("2.13.0+cu13", set()),
        ("2.20.2", set()),
    ],
)
def test_a_version_is_judged_by_what_it_has(version: str, missing: set[str]) -> None:
    assert set(lacking(TE, version)) == missing


def test_symbols() -> None:
    assert has_symbol("json:dumps(indent)") and not has_symbol("json:dumps(no_such)")
    assert has_symbol("json:JSONEncoder.encode~isinstance") and not has_symbol(
        "json:JSONEncoder.encode~no_such_word"
    )
    assert has_symbol("json:dumps") and not has_symbol("json:nothing") and not has_symbol("no_such_module:x")
    with pytest.raises(ValueError, match="not of the form"):
        has_symbol("json.dumps")
    assert len({use.key for use in USES}) == len(USES)


def test_findings_have_their_parts() -> None:
    text = (
        "--fp8-recipe dsv3: the installed Transformer Engine has no X. Use Transformer Engine 2.8 or newer."
    )
    assert from_message(text + "\nunrecognized arguments: --manuel-gc; did you mean --manual-gc?") == [
        Finding(
            "error",
            "--fp8-recipe dsv3",
            "the installed Transformer Engine has no X",
            "Transformer Engine 2.8 or newer",
        ),
        Finding("error", "--manuel-gc", "no such argument", "--manual-gc"),
    ]
    for text, finding in {
        "argument --num-layers: invalid int value: 'x' (all options: --help)": Finding(
            "error", "--num-layers", "invalid int value: 'x'", "what --help says of it"
        ),
        "layout=nope: no such layout. Available: cpu_ep4, pp8_ep8": Finding(
            "error", "layout=nope", "no such layout", "cpu_ep4, pp8_ep8"
        ),
        "layot=pp8: no such argument; did you mean 'layout'?": Finding(
            "error", "layot=pp8", "no such argument", "layout"
        ),
        "layout=pp8_ep9: no such layout; did you mean 'pp8_ep8'? Available: cpu_ep4, pp8_ep8": Finding(
            "error", "layout=pp8_ep9", "no such layout", "pp8_ep8, or another of cpu_ep4, pp8_ep8"
        ),
    }.items():
        assert from_message(text) == [finding]
    found = from_megatron(AssertionError("Must use --overlap-param-gather with --overlap-grad-reduce"))
    assert found.argument == "--overlap-param-gather" and found.severity == "error"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in USAGE)
    assert command.main(["python", "train.py", "output=json"]) == 2
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["ok"] is False and said["findings"][0]["severity"] == "error"
    assert set(said["findings"][0]) == {"severity", "argument", "why", "use"}
    for words in (
        ["python", "train.py"],
        [""],
        ["output=xml", "model=tiny"],
        ["te=2.8", "te=2.12", "model=tiny"],
    ):
        with pytest.raises(SystemExit, match="2"):
            command.main(words)
        said = capsys.readouterr()
        assert not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1
        assert " Use " in said.err


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--manual-gc --tokenizer-type HuggingFaceTokenizer --tokenizer-model x --vocab-size 128", 0),
        ("--no-such-word", 1),
    ],
)
def test_exit_status_and_json_of_the_process(words: str, status: int) -> None:
    line = (
        "nodes=1 gpus_per_node=2 -- torchrun -m dsv3_megatron.train --spec dsv3 --transformer-impl local --bf16 "
        "--num-layers 4 --mock-data --train-iters 2 --global-batch-size 4 " + words
    )
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_megatron.preflight", *line.split(), "output=json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stderr[-2000:]
    said = json.loads(done.stdout)  # nothing else is there, whatever options and Megatron have to say
    assert said["ok"] == (status == 0)
    errors = [finding["argument"] for finding in said["findings"] if finding["severity"] == "error"]
    assert errors == ([] if status == 0 else ["--no-such-word"])
