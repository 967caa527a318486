"""Every layout and every example script through the check, for Apex and each Transformer Engine that is told apart."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.conf import training_layouts

ROOT = Path(__file__).resolve().parents[2]
TE = ("absent", "2.8", "2.12", "2.20")
MACHINES = [{"apex": apex, "te": te} for te in reversed(TE) for apex in ("absent", "present")]
# Apex is told apart with the newest only; the slow test goes through all.
FEWER = [machine for machine in MACHINES if machine["te"] == TE[-1] or machine["apex"] == "absent"]
Findings = list[dict[str, str]]


def walk(tasks: list[dict[str, Any]]) -> list[list[Findings]]:
    """Answers of tests.preflight.walk: per task and machine."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.preflight.walk"],
        input="\n".join(json.dumps(task) for task in tasks),
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def model_of(layout: str) -> str:
    """The model a layout is for."""
    return "tiny" if layout.startswith("cpu_") else "v3_671b"


LAYOUTS = {
    layout: [f"model={model_of(layout)}", f"layout={layout}"]
    + (["recipe=longctx_32k", "pretrained_checkpoint=x"] if "_cp" in layout else [])
    + ([] if layout.startswith("cpu_") or "_cp" in layout else ["global_batch_size=15360"])
    for layout in training_layouts()
}
SCRIPTS = {
    script.name: ["corpus" if "hydra" in script.name else "data/train", "checkpoints", "checkpoints"]
    for script in sorted((ROOT / "examples").glob("*.sh"))
}


def command_of(script: str) -> list[str]:
    """What a script would start."""
    words = SCRIPTS[script][: 2 if "hydra" in script else 3]
    env = {**os.environ, "DRY_RUN": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "SLURM_JOB_ID", "SLURM_SUBMIT_DIR"):
        env.pop(name, None)
    done = subprocess.run(
        ["bash", f"examples/{script}", *words],
        capture_output=True, text=True, env=env, cwd=ROOT, timeout=240, check=True,
    )  # fmt: skip
    return shlex.split(done.stdout.splitlines()[-1])


def expected(te: str, on_cpu: bool) -> str | None:
    """Argument of the error that is due, None where the job can run."""
    if on_cpu:
        return None
    return "--transformer-impl" if te == "absent" else None


def machines_of(layout: str) -> list[dict[str, str]]:
    """A run on CPU asks nothing of the machine; others of the newest and of none, the published layout of each."""
    if layout.startswith("cpu_"):
        return FEWER[:1]
    return FEWER if layout == "pp16_ep64" else [FEWER[0], FEWER[-1]]


def judge(name: str, machines: list[dict[str, str]], answers: list[Findings]) -> None:
    """What cannot run is refused with what to use, and nothing else is."""
    on_cpu = name.startswith("cpu_")
    for machine, found in zip(machines, answers, strict=True):
        errors = [f for f in found if f["severity"] == "error"]
        due = expected(machine["te"], on_cpu)
        if due is None:
            assert not errors, (name, machine, errors)
        else:
            assert errors and any(f["argument"].startswith(due) for f in errors), (name, machine, errors)
            assert all(f["use"] for f in errors), (name, machine, errors)
        # bf16 moments, which an older Transformer Engine copies to fp32 in its step.
        warned = any(f["argument"].startswith("--exp-avg-dtype") for f in found)
        assert warned == (not on_cpu and due is None and machine["te"] in ("2.8", "2.12"))


@cache
def answers_of_layouts() -> dict[str, list[Findings]]:
    """All in one process."""
    tasks = [
        {
            "line": ["-m", "dsv3_megatron.train_hydra", *words],
            "machines": machines_of(layout),
            "build": False,
        }
        for layout, words in LAYOUTS.items()
    ]
    return dict(zip(LAYOUTS, walk(tasks), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    judge(layout, machines_of(layout), answers_of_layouts()[layout])


BUILT = ("cpu_pp2_ep2", "pp16_ep64")


@cache
def built() -> dict[str, list[Findings]]:
    """The model of a small and of the published layout is built; and controls: planted flags that break."""
    plain = "torchrun --nnodes 32 --nproc-per-node 8 -m dsv3_megatron.train --spec dsv3 --mock-data --bf16 "
    plain += "--global-batch-size 960 --train-iters 10 --pipeline-model-parallel-size 16 --use-distributed-optimizer "
    plain += "--pipeline-model-parallel-layout Et*4|(t*4|)*14tmL --expert-model-parallel-size 16 "
    tp = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-schedule dualpipe "
    tp += "--expert-model-parallel-size 8"
    te = {"te": "2.20"}
    tasks: dict[str, dict[str, Any]] = {
        name: {"line": LAYOUTS[name], "machines": [te], "build": True} for name in BUILT
    }
    controls: dict[str, tuple[str, dict[str, Any]]] = {
        "misspelled": (plain + "--manuel-gc", te),
        "te cross entropy": (plain + "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te", te),
        "fp8 param gather": (plain + "--fp8-recipe dsv3 --fp8-param-gather", te),
        "fp8 on a100": (plain + "--fp8-recipe dsv3", te | {"gpu": "a100"}),
        "fp8 on cuda 12.8": (plain + "--fp8-recipe dsv3", te | {"cuda": "12.8"}),
        "old torch": (plain, te | {"torch": "2.9.1"}),
        "one queue": ("CUDA_DEVICE_MAX_CONNECTIONS=1 " + plain + "--pipeline-schedule dualpipe", te),
        "mirrors": (plain.replace("--use-distributed-optimizer", "--pipeline-schedule dualpipe"), te),
        "size": (plain.replace("--nnodes 32", "--nnodes 30"), te),
        "experts": (plain + "--num-experts 255", te),
        "layers": (plain + "--num-layers 62 --pipeline-schedule zb1p", te),
        "host memory": (plain + "--save x --save-interval 500", te | {"host_memory": "200"}),
        "fine: host memory": (plain + "--save x --save-interval 500", te),
        "another model": (plain.replace("-m dsv3_megatron.train --spec dsv3", "pretrain_gpt.py"), te),
        "another spec": (plain.replace("--spec dsv3", "--spec local"), te),
        "queues in words": ("CUDA_DEVICE_MAX_CONNECTIONS=many " + plain, te),
        "deepep": (plain + "--moe-token-dispatcher-type flex", te | {"deepep": "absent"}),
        # and its contrary: with tensor parallelism and a schedule of ours, Megatron's wish for one queue is met
        "fine: tensor parallel": (plain + tp, te),
        # block scaling of TE's own gathers compact tensors in every version
        "fine: fp8 tensor parallel": (plain + "--fp8-recipe dsv3 " + tp, {"te": "2.8"}),
        "fine: plain": (plain, te),
        "fine: reference": (plain + "--transformer-impl local", {"te": "absent"}),
    }
    for name, (line, machine) in controls.items():
        tasks[name] = {
            "line": [line],
            "machines": [machine],
            "build": name in ("fine: reference", "host memory", "fine: host memory"),
        }
    return dict(zip(tasks, walk(list(tasks.values())), strict=True))


def errors_of(name: str) -> Findings:
    return [finding for finding in built()[name][0] if finding["severity"] == "error"]


@pytest.mark.parametrize("layout", BUILT)
def test_the_model_is_built(layout: str) -> None:
    found = built()[layout][0]
    assert not errors_of(layout)
    said = [f["argument"] for f in found]
    assert ("transformer-engine" in said) == (not layout.startswith("cpu_"))  # what stood in for it


CONTROLS = {
    "misspelled": "--manuel-gc",
    "te cross entropy": "--cross-entropy",
    "fp8 param gather": "--fp8-param-gather",
    "fp8 on a100": "--fp8-recipe",
    "fp8 on cuda 12.8": "--fp8-recipe",
    "old torch": "torch",
    "one queue": "CUDA_DEVICE_MAX_CONNECTIONS",
    "mirrors": "--use-distributed-optimizer",
    "size": "",
    "experts": "",
    "layers": "",
    "host memory": "--dist-ckpt-optim-fully-reshardable",
    "deepep": "--moe-token-dispatcher-type",
    "another model": "pretrain_gpt.py without --spec",
    "another spec": "--spec local",
    "queues in words": "CUDA_DEVICE_MAX_CONNECTIONS=many",
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_planted_fault_is_found(name: str) -> None:
    errors = errors_of(name)
    assert any(CONTROLS[name] in f["argument"] + f["why"] for f in errors), built()[name]


@pytest.mark.parametrize(
    "name", ["fine: tensor parallel", "fine: fp8 tensor parallel", "fine: plain", "fine: reference"]
)
def test_a_good_line_is_not_refused(name: str) -> None:
    assert not errors_of(name)


def test_host_memory_that_nobody_says() -> None:
    """What checkpoints take is told, where it cannot be compared."""
    [found] = [f for f in built()["fine: host memory"][0] if f["argument"] == "host memory"]
    assert not errors_of("fine: host memory") and found["severity"] == "info"
    assert re.match(r"a machine needs \d+ GB for checkpoints; nobody says", found["why"])


@pytest.mark.slow
def test_every_script_and_every_layout_built() -> None:
    lines = {script: command_of(script) for script in SCRIPTS} | LAYOUTS
    tasks = [{"line": line, "machines": MACHINES, "build": True} for line in lines.values()]
    for name, answers in zip(lines, walk(tasks), strict=True):
        judge(name, MACHINES, answers)


def test_a_script() -> None:
    machines = [FEWER[0], FEWER[-1]]
    [answers] = walk([{"line": command_of("slurm_2048gpu.sh"), "machines": machines, "build": False}])
    judge("slurm_2048gpu.sh", machines, answers)
    runs = next(a for m, a in zip(machines, answers, strict=True) if m == {"apex": "absent", "te": "2.20"})
    # The launch flags that a GPU job wants are all there: nothing is advised but what this machine cannot see.
    advised = {f["argument"] for f in runs if f["severity"] == "warning"}
    assert advised == {"--data-path", "--tokenizer-model", "PYTORCH_ALLOC_CONF"}
