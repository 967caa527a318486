"""The FLOP count against the published figures and against counted matrix products."""

from dataclasses import replace

import pytest

from dsv3_megatron.metrics.flops import ModelSizes, active_matmul_parameters, flops_per_token
from dsv3_megatron.plan.deepseek import SIZES as V3
from tests.harness import run_distributed


def test_published_figures_of_v3():
    causal = flops_per_token(V3, causal=True, mtp=False)
    non_causal = flops_per_token(V3, causal=False, mtp=False)
    assert causal == pytest.approx(0.250e12, rel=2e-3)
    # Table 4 of the ISCA paper: 432 TFLOPS non-causal, 385 causal, from the same step time.
    assert non_causal / causal == pytest.approx(432 / 385, rel=2e-3)
    # 1542 tokens/s/GPU of §3 of the facts are those 385 TFLOPS.
    assert 1542 * causal / 1e12 == pytest.approx(385, rel=5e-3)
    # Active parameters with the embedding: 37.55B.
    assert active_matmul_parameters(V3, mtp=False) + 129280 * 7168 == pytest.approx(37.55e9, rel=1e-3)


def test_mtp_adds_a_layer_its_projection_and_the_head_again():
    layer = replace(V3, num_layers=1, num_moe_layers=1, mtp_num_layers=0)
    one_more = flops_per_token(layer)  # attention, MoE, head
    projection = 6 * (2 * 7168) * 7168
    assert flops_per_token(V3) - flops_per_token(V3, mtp=False) == one_more + projection
    assert flops_per_token(replace(V3, mtp_num_layers=0)) == flops_per_token(V3, mtp=False)


def count_flops(rank: int, world_size: int) -> tuple[int, int]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.utils.flop_counter import FlopCounterMode

    from tests.specs.models import VOCAB_SIZE, build, micro_config, random_batch

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = micro_config(mtp_num_layers=1)
    model = build(config)
    with FlopCounterMode(display=False) as counter:
        model(attention_mask=None, **random_batch(batch=2, seq=16)).mean().backward()
    sizes = ModelSizes.from_config(config.transformer, padded_vocab_size=VOCAB_SIZE, seq_length=16)
    return counter.get_total_flops(), 2 * 16 * flops_per_token(sizes, causal=False)


def test_count_equals_the_matrix_products_that_torch_counts():
    counted, expected = run_distributed(count_flops, world_size=1)[0]
    assert counted == expected
