"""Options of Megatron's that write down what a step computed: the files are there and hold this run's numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arguments.lines import MICRO
from tests.harness import run_distributed

NAMES = ("params", "wgrads")
TOKENS, TOPK, LAYERS = 8 * 32, 4, {1, 2, 3}  # of a step; the first layer is dense
Tensors = dict[str, dict[str, torch.Tensor]]


def train(rank: int, world_size: int, words: list[str]) -> Tensors:
    """Train three steps; of the second one the gradients, and the weights after it, by name."""
    from dsv3_megatron import train
    from dsv3_megatron.training import hooks

    seen: Tensors = {name: {} for name in NAMES}

    def keep(call: dict[str, Any], name: str, attribute: str) -> None:
        if call["iteration"] == 1:
            for key, weight in call["model"][0].named_parameters():
                seen[name][key.removeprefix("module.")] = getattr(weight, attribute).detach().clone()

    hooks.before_update(lambda call: keep(call, "wgrads", "main_grad"))
    hooks.after_step(lambda call, result: keep(call, "params", "data"))
    train.main(["--spec", "dsv3", "--device", "cpu", *MICRO, *words])
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    folder = tmp_path_factory.mktemp("written")
    words = [word for name in NAMES for word in (f"--save-{name}-interval", "2")]
    words += [
        "--save",
        f"{folder}/save",
        "--save-interval",
        "3",
        "--moe-routing-trace-path",
        f"{folder}/trace",
    ]
    return folder, run_distributed(train, world_size=1, timeout=240, init=False, words=words)[0]


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_the_second_step(name: str, run: tuple[Path, Tensors]) -> None:
    folder, seen = run
    steps = sorted((folder / "save" / name).iterdir())
    assert [step.name for step in steps] == ["iter_0000002"]
    (file,) = steps[0].iterdir()
    found = torch.load(file, weights_only=False)["model_chunk0"]
    ours = {key.removeprefix("module."): tensor for key, tensor in seen[name].items()}
    assert found.keys() == ours.keys() and len(found) > 100
    assert [key for key in found if not torch.equal(found[key], ours[key])] == []
    assert float(found["embedding.word_embeddings.weight"].norm()) > 0


def test_routing(run: tuple[Path, Tensors]) -> None:
    folder, _ = run
    (file,) = (folder / "trace").glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert {record["layer"] for record in records if record["block"] == "decoder"} == LAYERS
    for record in records:
        assert all(len(set(chosen)) == TOPK for chosen in record["top_indices"])
    first = [r for r in records if (r["block"], r["layer"], r["step"]) == ("decoder", 1, 0)]
    assert sum(record["num_tokens"] for record in first) == TOKENS
