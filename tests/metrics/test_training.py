"""The metrics of real training runs, against counts taken independently and against Megatron's own log."""

import json
import re
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.arguments.lines import MICRO
from tests.harness import run_distributed

ITERATIONS, INTERVAL = 4, 2
WORDS = [*MICRO, "--train-iters", str(ITERATIONS), "--log-interval", str(INTERVAL), "--log-throughput"]
PP2_EP2 = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]


def train(rank: int, world_size: int, words: list[str]) -> dict[str, Any]:
    """Train; return the figures and, by our own hook, what this rank's routers chose in the last step."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.training import get_args

    from dsv3_megatron import metrics
    from dsv3_megatron.train import main

    chosen: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(8, dtype=torch.int64))
    biases: dict[int, torch.Tensor] = {}

    def hook(module: Any, _inputs: Any, output: Any) -> None:
        if isinstance(module, TopKRouter) and module.training and get_args().curr_iteration == ITERATIONS - 1:
            number = module.layer_number - 1 + (4 if module.is_mtp_layer else 0)
            chosen[number] += output[1].sum(dim=0)
            biases[number] = module.expert_bias

    torch.nn.modules.module.register_module_forward_hook(hook)
    main(["--spec", "dsv3", "--device", "cpu", *words])
    return {"latest": metrics.latest(), "chosen": dict(chosen), "biases": biases, "rank": dist.get_rank()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, Any]:
    """PP2 × EP2 on four ranks."""
    folder = tmp_path_factory.mktemp("metrics")
    words = [*WORDS, *PP2_EP2, "--tensorboard-dir", str(folder / "tb")]
    ranks = run_distributed(train, world_size=4, init=False, log_dir=folder, words=words)
    records = [json.loads(line) for line in (folder / "tb" / "metrics.jsonl").read_text().splitlines()]
    return {"ranks": ranks, "records": records, "folder": folder}


def test_every_rank_knows_the_figures_and_the_file_has_one_line_per_logged_step(run):
    latest = run["ranks"][0]["latest"]
    assert all(rank["latest"] == latest for rank in run["ranks"])
    assert [record["iteration"] for record in run["records"]] == [2, 4]
    assert run["records"][-1] == latest
    assert latest["consumed_train_samples"] == 8 * ITERATIONS
    assert latest["consumed_train_tokens"] == 8 * ITERATIONS * 32


def test_expert_load_is_that_of_the_global_batch(run):
    total: dict[int, torch.Tensor] = {}
    biases: dict[int, torch.Tensor] = {}
    for rank in run["ranks"]:
        for number, counts in rank["chosen"].items():
            total[number] = total.get(number, 0) + counts
        biases |= rank["biases"]
    layers = run["ranks"][0]["latest"]["layers"]
    assert sorted(map(int, layers)) == sorted(total) == [1, 2, 3, 4]  # over two stages, and MTP
    for number, counts in total.items():
        assert counts.sum() == 8 * 32 * 4  # samples, tokens, top-k: all tokens of the step, once
        figures = layers[str(number)]
        assert figures["max_over_mean"] == counts.max().item() / counts.double().mean().item()
        assert figures["tokens_per_expert"] == counts.tolist()
        assert figures["dead"] == (counts == 0).sum().item()
        assert figures["dropped"] == 0
        assert figures["bias_min"] == biases[number].min().item()
        assert figures["bias_max"] == biases[number].max().item()
    assert max(layer["bias_max"] for layer in layers.values()) > 0
    worst = max(layer["max_over_mean"] for layer in layers.values())
    assert run["ranks"][0]["latest"]["max_over_mean_expert_load"] == worst


def test_figures_agree_with_megatrons_own_log(run):
    log = (run["folder"] / "rank3.log").read_text()
    lines = re.findall(r"iteration +(\d+)/.*", log)
    own = {}
    for line in log.splitlines():
        if match := re.search(r"iteration +(\d+)/", line):
            own[int(match[1])] = {
                "lm_loss": float(re.search(r"lm loss: (\S+)", line)[1]),
                "mtp_loss": float(re.search(r"mtp_1 loss: (\S+)", line)[1]),
                "ms": float(re.search(r"elapsed time per iteration \(ms\): (\S+)", line)[1]),
            }
    assert lines
    for record in run["records"]:
        megatron = own[record["iteration"]]
        assert record["lm_loss"] == pytest.approx(megatron["lm_loss"], rel=1e-5)
        assert record["mtp_loss"] == pytest.approx(megatron["mtp_loss"], rel=1e-5)
        assert record["tokens_per_s"] == pytest.approx(8 * 32 / megatron["ms"] * 1e3, rel=0.1)
    per_gpu = record["model_flops_per_token_causal"] * record["tokens_per_s"] / 4
    assert record["model_flops_per_s_per_gpu_causal"] == pytest.approx(per_gpu)
    assert "load max/mean" in log and "dropped tokens 0" in log and "mtp0" in log


def test_tensorboard_holds_the_same_figures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run["folder"] / "tb"))
    events.Reload()
    for record in run["records"]:
        expected = {f"dsv3/{name}": record[name] for name in ("tokens_per_s", "mtp_loss", "dropped_tokens")}
        for number, figures in record["layers"].items():
            for name in ("max_over_mean", "dead", "bias_min", "bias_max", "dropped"):
                if figures[name] is not None:
                    expected[f"experts-{name}/layer_{int(number):02d}"] = figures[name]
        for tag, value in expected.items():
            if value is not None:
                found = {event.step: event.value for event in events.Scalars(tag)}
                assert found[record["iteration"]] == pytest.approx(value, rel=1e-6), tag


def test_one_process_without_parallelism_has_the_same_figures(run):
    alone = run_distributed(train, world_size=1, init=False, words=WORDS)[0]["latest"]
    latest = run["ranks"][0]["latest"]
    assert alone["layers"] == latest["layers"]
    for name in ("lm_loss", "mtp_loss"):
        assert alone[name] == pytest.approx(latest[name], rel=1e-5)
    for name in ("model_flops_per_token_causal", "model_flops_per_token_non_causal", "consumed_train_tokens"):
        assert alone[name] == latest[name]


def drop_by_capacity(rank: int, world_size: int, capacity: float | None) -> tuple[int | None, int]:
    """Pairs dropped as reported, and as counted from the routing map of Megatron's own router."""
    import dataclasses

    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from dsv3_megatron.metrics.collector import Collector
    from tests.specs.models import micro_config

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = micro_config(moe_layer_freq=[1, 1]).transformer
    config = dataclasses.replace(config, moe_expert_capacity_factor=capacity)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    spec = get_moe_module_spec(use_te=False, num_experts=8)
    layer = spec(config=config, pg_collection=groups)
    layer.set_layer_number(1)
    collector = Collector()
    collector.snapshot(config, [layer])  # what the first step does: finds the layer
    kept = []
    layer.router.register_forward_hook(lambda _module, _inputs, output: kept.append(int(output[1].sum())))
    for _ in range(2):
        output, _ = layer(torch.randn(16, 2, 32))
        output.sum().backward()
    collector.snapshot(config, [layer])
    reported = collector.reduce()[0].dropped
    return reported, 2 * 16 * 2 * config.moe_router_topk - sum(kept)


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_dropped_tokens_are_counted_where_tokens_are_dropped(capacity):
    reported, expected = run_distributed(drop_by_capacity, world_size=1, capacity=capacity)[0]
    assert reported == expected
    assert (expected > 0) == (capacity is not None)
