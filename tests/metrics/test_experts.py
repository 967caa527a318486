"""Statistics of token counts, and their way through a sum over ranks."""

import math

import pytest
import torch

from dsv3_megatron.metrics.experts import LayerExperts, pack, unpack
from dsv3_megatron.metrics.report import append_json, console, expert_figures


def layer(counts: list[int], routed: int = 0, received: int = 0) -> LayerExperts:
    return LayerExperts(torch.tensor(counts), -0.25, 0.5, routed, received)


def test_load_dead_and_dropped():
    figures = layer([6, 0, 2, 0], routed=10, received=8).summary()
    assert figures.pop("tokens_per_expert") == [6, 0, 2, 0]
    assert figures == {"max_over_mean": 3.0, "dead": 2, "bias_min": -0.25, "bias_max": 0.5, "dropped": 2}
    assert layer([2, 2]).dropped is None  # not counted is not "none dropped"
    assert math.isnan(layer([0, 0]).max_over_mean)


def test_sum_over_ranks_is_exact_for_counts_and_bias():
    bias = torch.tensor([0.1, -1e-3, 3e-38, 0.0])  # not multiples of a power of two: a float mean would round
    counts = [torch.tensor([2**40, 1, 0, 3]), torch.tensor([5, 2**24 + 1, 0, 3]), torch.tensor([0, 0, 0, 1])]
    rows = [pack(c, bias, routed=4, received=torch.tensor(3)) for c in counts]
    found = unpack(sum(rows, torch.zeros_like(rows[0])))
    assert found is not None
    assert found.tokens_per_expert.tolist() == [2**40 + 5, 2**24 + 2, 0, 7]
    assert torch.tensor([found.bias_min, found.bias_max]).tolist() == [bias[1].item(), bias[0].item()]
    assert (found.routed, found.received, found.dropped) == (12, 9, 3)


def test_float_counts_of_megatrons_own_router_are_taken_too():
    found = unpack(pack(torch.tensor([3.0, 5.0]), torch.zeros(2), 0, 0))
    assert found is not None and found.tokens_per_expert.dtype == torch.int64


def test_a_layer_without_experts_has_no_statistics():
    assert unpack(torch.zeros(4 + 5, dtype=torch.int64)) is None


def test_drifted_copies_of_a_router_are_an_error():
    a = pack(torch.ones(2), torch.tensor([0.0, 0.001]), 0, 0)
    b = pack(torch.ones(2), torch.tensor([0.0, 0.0010001]), 0, 0)
    with pytest.raises(RuntimeError, match="expert bias of one layer differs"):
        unpack(a + b)


def test_totals_take_the_worst_layer_and_the_sums():
    figures = expert_figures({3: layer([1, 3], 4, 4), 4: layer([4, 0], 4, 3)})
    assert figures["max_over_mean_expert_load"] == 2.0
    assert (figures["dead_experts"], figures["dropped_tokens"]) == (1, 1)
    assert list(figures["layers"]) == ["3", "4"]
    assert expert_figures({3: layer([1, 3], 4, 4), 4: layer([4, 0])})["dropped_tokens"] is None
    assert expert_figures({}) == {}


def test_console_and_json(tmp_path):
    record = {"iteration": 5, "tokens_per_s": 10.0, "lm_loss": math.nan, "mtp_loss": 1.5}
    for kind in ("causal", "non_causal"):
        record |= {f"model_flops_per_token_{kind}": 2.504e11, f"model_flops_per_s_per_gpu_{kind}": 3.85e14}
    record |= expert_figures({3: layer([1, 3], 4, 4), 4: layer([4, 0], 4, 4)})
    text = console(record, num_layers=4)
    assert "250.4 GFLOP causal" in text and "385 TFLOP/s causal" in text and "dropped tokens 0" in text
    rows = {line.split("  ")[1].strip(): line.split()[-2:] for line in text.splitlines()[1:]}
    assert rows["layer"] == ["3", "mtp0"]
    assert rows["load max/mean"] == ["1.50", "2.00"]
    assert rows["dead experts"] == ["0", "1"]
    append_json(tmp_path / "new" / "metrics.jsonl", record)
    append_json(tmp_path / "new" / "metrics.jsonl", record)
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"lm_loss": null' in lines[0]
