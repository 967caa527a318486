"""The three ways in train the same model: our trainer, an unpatched pretrain_gpt.py, a patched one.

With MEGATRON_LM_SOURCE set to a Megatron-LM checkout, its real `pretrain_gpt.py` runs; otherwise
`pretrain_driver.py`, which makes the same calls. The patch is always applied, to a copy of the installed
wheel's files.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from dsv3_megatron.arguments import complete
from dsv3_megatron.cpu import CPU_FLAGS
from dsv3_megatron.studies.ports import free_port
from tests.arguments.lines import MICRO, whole_mock_data
from tests.harness import run_distributed

REPOSITORY = Path(__file__).parents[2]
PATCHES = sorted((REPOSITORY / "patches").glob("*.patch"))
SOURCE = os.environ.get("MEGATRON_LM_SOURCE")
LOG = ["--log-interval", "1"]
LAYOUT = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer", *LOG]


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The checkout's pretrain_gpt.py beside its neighbours, or the driver.

    In a folder of its own: the checkout's `megatron` would come before the wheel's, and is not compiled.
    """
    if not SOURCE:
        return Path(__file__).with_name("pretrain_driver.py")
    folder = tmp_path_factory.mktemp("scripts")
    for file in Path(SOURCE).glob("*.py"):
        shutil.copy(file, folder)
    return folder / "pretrain_gpt.py"


def launch(script: Path, words: list[str], *, megatron: Path | None = None, num_ranks: int = 1) -> str:
    """The script's output under the CPU runtime, with `megatron` from that folder if one is given.

    One rank is started as torchrun would start it, without torchrun, which imports torch first.
    """
    path = [str(folder) for folder in (megatron, REPOSITORY) if folder is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = ["-m", "dsv3_megatron.cpu", str(script), *words]
    if num_ranks == 1:
        command = [sys.executable, *command]
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
        environment |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
        command = [*torchrun, "--master-port", str(free_port()), *command]
    run = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=280
    )
    return f"{run.stdout}{run.stderr}\nstatus {run.returncode}"


def losses(output: str) -> dict[int, tuple[float, float]]:
    """Main and MTP loss of each iteration in Megatron's log."""
    found = re.findall(r"iteration\s+(\d+)/.*?lm loss: (\S+) .*?mtp_1 loss: (\S+) ", output)
    assert found, f"no losses in the output:\n{output[-4000:]}"
    return {int(step): (float(main), float(mtp)) for step, main, mtp in found}


def train(rank: int, world_size: int, words: list[str]) -> tuple[float, float]:
    from dsv3_megatron import metrics
    from dsv3_megatron.train import main

    whole_mock_data()  # as the scripts have it
    result = main(words)
    assert result == {"iteration": 3, "consumed_train_samples": 24}
    latest = metrics.latest()
    assert latest["iteration"] == 3
    return latest["lm_loss"], latest["mtp_loss"]


@pytest.fixture(scope="module")
def trainer_losses() -> tuple[float, float]:
    """Last main and MTP loss of way (a), on four ranks with a pipeline."""
    words = ["--spec", "dsv3", "--device", "cpu", *MICRO, *LAYOUT, "--pipeline-model-parallel-size", "2"]
    by_rank = run_distributed(train, world_size=4, timeout=240, init=False, words=words)
    assert len(set(by_rank)) == 1
    return by_rank[0]


def test_a_our_trainer(trainer_losses):
    import math

    # Untrained, every token is equally likely: ln(vocabulary), here 128.
    assert trainer_losses == pytest.approx((math.log(128),) * 2, rel=0.05)
    other_seed = ["--spec", "dsv3", "--device", "cpu", *MICRO, *LAYOUT, "--seed", "7"]
    other = run_distributed(train, world_size=2, timeout=240, init=False, words=other_seed)[0]
    assert abs(other[0] - trainer_losses[0]) > 1e-4


WAYS = [pytest.param(1, LOG, id="1"), pytest.param(2, LAYOUT, id="2", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("num_ranks", "layout"), WAYS)
def test_b_unpatched_pretrain_gpt(trainer_losses, script, num_ranks, layout):
    """Every setting is given, as `complete` would; the weights are ours by name, so the losses are (a)'s."""
    words = complete(["--spec", "dsv3_megatron.specs", "dsv3", *CPU_FLAGS, *MICRO])
    output = launch(script, [*words, *layout], num_ranks=num_ranks)
    assert losses(output)[3] == pytest.approx(trainer_losses, rel=2e-6)


def test_b_missing_settings_are_listed(script):
    words = ["--spec", "dsv3_megatron.specs", "dsv3", *CPU_FLAGS, *MICRO, *LAYOUT]
    words += ["--max-position-embeddings", "32", "--tokenizer-type", "NullTokenizer"]
    output = launch(script, words)  # refused before ranks meet
    assert "RefusedArgument" in output
    assert "--multi-latent-attention" in output and "--moe-router-score-function sigmoid" in output
    assert "initialized tensor model parallel" not in output


@pytest.fixture(scope="module")
def patched_megatron(tmp_path_factory) -> Path:
    """A copy of the wheel's `megatron` folder with the patch applied."""
    installed = Path(str(distribution("megatron-core").locate_file("megatron")))
    root = tmp_path_factory.mktemp("patched")
    shutil.copytree(
        installed, root / "megatron"
    )  # compiled files too: what the patch changes is compiled anew
    assert len(PATCHES) == 1, "one patch per supported Megatron version; this test knows one version"
    subprocess.run(["git", "apply", "--check", str(PATCHES[0])], cwd=root, check=True)
    subprocess.run(["git", "apply", str(PATCHES[0])], cwd=root, check=True)
    changed = (root / "megatron/training/arguments.py").read_text()
    assert changed != (installed / "training/arguments.py").read_text()
    return root


@pytest.mark.parametrize(("num_ranks", "layout"), WAYS)
def test_c_patched_pretrain_gpt(trainer_losses, script, patched_megatron, num_ranks, layout):
    words = ["--spec", "dsv3", *CPU_FLAGS, *MICRO, *layout]
    output = launch(script, words, megatron=patched_megatron, num_ranks=num_ranks)
    assert losses(output)[3] == pytest.approx(trainer_losses, rel=2e-6)


@pytest.mark.slow
def test_c_under_dualpipe(trainer_losses, script, patched_megatron):
    """Megatron's own entry point, builder and forward step under our schedule."""
    words = [*LAYOUT, "--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "1"]
    words += ["--pipeline-schedule", "dualpipe"]
    words = ["--spec", "dsv3", *CPU_FLAGS, *MICRO, *words]
    output = launch(script, words, megatron=patched_megatron, num_ranks=2)
    assert losses(output)[3] == pytest.approx(trainer_losses, rel=1e-5)


@pytest.mark.slow
def test_c_in_fp8(script, patched_megatron):
    """One word is FP8 in Megatron's own entry point as in our trainer."""
    words = [*MICRO, *LAYOUT, "--bf16", "--fp8-recipe", "dsv3"]
    ours = run_distributed(
        train, world_size=2, timeout=240, init=False, words=["--spec", "dsv3", "--device", "cpu", *words]
    )[0]
    words = ["--spec", "dsv3", *CPU_FLAGS, *words]
    output = launch(script, words, megatron=patched_megatron, num_ranks=2)
    assert "--fp8-recipe dsv3: module, products, kept for backward" in output
    assert losses(output)[3] == pytest.approx(ours, rel=2e-6)


@pytest.mark.slow
def test_c_schedule_plans_need_half_precision(script, patched_megatron):
    words = [
        "--pipeline-model-parallel-size",
        "2",
        "--expert-model-parallel-size",
        "2",
        "--pipeline-schedule",
        "zb1p",
    ]
    output = launch(
        script, ["--spec", "dsv3", *CPU_FLAGS, *MICRO, *words], megatron=patched_megatron, num_ranks=4
    )
    assert "error: --pipeline-schedule zb1p with --expert-model-parallel-size 2" in output


def test_c_contradiction_is_refused_cleanly(script, patched_megatron):
    words = ["--spec", "dsv3", *CPU_FLAGS, *MICRO, "--normalization", "LayerNorm"]
    output = launch(script, words, megatron=patched_megatron)
    assert "error: --normalization LayerNorm contradicts DeepSeek-V3" in output
    assert output.endswith("status 2") and "Traceback" not in output


@pytest.mark.skipif(not SOURCE, reason="MEGATRON_LM_SOURCE is not set")
def test_patch_applies_to_the_checkout():
    subprocess.run(["git", "apply", "--check", str(PATCHES[0])], cwd=SOURCE, check=True)
