"""The same step in every layout: loss, every gradient, every token count, biases and logged losses.

Compared with one process on the same global batch, MTP and balance loss on, fp32 within 1e-5 per parameter.
"""

import functools

import pytest
import torch

from tests.parallel.common import Layout, Problem, StepResult, assert_same_step, run_step

# Uneven on purpose: a stage without MoE layers, and one with nothing but MTP and the head.
STAGES_PP4 = (("embedding", "decoder"), ("decoder",), ("decoder", "decoder"), ("mtp", "loss"))
STAGES_PP2_VPP2 = (("embedding", "decoder"), ("decoder",), ("decoder",), ("decoder", "mtp", "loss"))

LAYOUTS = {
    "dp2": Layout(2),
    "ep2": Layout(2, ep=2),
    "ep4": Layout(4, ep=4),
    "tp2": Layout(2, tp=2),
    "cp2": Layout(2, cp=2),
    "pp2": Layout(2, pp=2),
    "pp2_vpp2": Layout(2, pp=2, stages=STAGES_PP2_VPP2),
    "pp4": Layout(4, pp=4, stages=STAGES_PP4),
    "tp2_ep2": Layout(4, tp=2, ep=2),
    "tp2_cp2": Layout(4, tp=2, cp=2),
    "pp2_ep2": Layout(4, pp=2, ep=2),
}


@functools.cache
def whole(problem: Problem) -> StepResult:
    return run_step(Layout(), problem)


# What other tests of this file and of test_training.py show by default, with padding or over several steps.
ELSEWHERE = ("ep2", "tp2", "cp2", "pp2", "pp2_vpp2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ELSEWHERE else name for name in LAYOUTS]
)
def test_same_step_as_one_process(name) -> None:
    assert_same_step(run_step(LAYOUTS[name], Problem()), whole(Problem()))


@pytest.mark.parametrize("name", ["tp2_ep2", "cp2", "pp2_vpp2"])
def test_padded_tokens_in_every_layout(name) -> None:
    """Padding of different lengths under per-token loss: neither counted nor in any loss."""
    # With sequence parallelism Megatron shifts MTP's mask within each rank's part, so without MTP there.
    no_mtp = (("mtp_num_layers", None),) if LAYOUTS[name].tp > 1 else ()
    problem = Problem(padded_tokens=(0, 4, 1, 0, 7, 0, 16, 2), per_token_loss=True, overrides=no_mtp)
    got = run_step(LAYOUTS[name], problem)
    assert_same_step(got, whole(problem))
    valid = 8 * 16 - 30
    assert all(c.sum() == 3 * valid for n, c in got.counts.items() if n.startswith("decoder."))


@pytest.mark.parametrize("name", ["dp2", "pp2_ep2"])
def test_fp64_agrees_much_closer(name) -> None:
    problem = Problem(dtype=torch.float64)
    assert_same_step(run_step(LAYOUTS[name], problem), whole(problem), tolerance=1e-10)


def test_gradient_reduce_overlap_changes_nothing() -> None:
    overlapped = Problem(ddp=(("overlap_grad_reduce", True), ("bucket_size", 2000)))
    for name in ("dp2", "pp2_vpp2"):
        assert_same_step(run_step(LAYOUTS[name], overlapped), whole(Problem()))


def test_the_comparison_notices_a_wrong_gradient() -> None:
    """Another batch, and one gradient scaled by 1 + 1e-4, are told apart."""
    got = run_step(Layout(), Problem())
    got.grads["decoder.layers.1.mlp.experts.5.linear_fc2.weight"] *= 1 + 1e-4
    with pytest.raises(AssertionError, match=r"experts\.5\.linear_fc2"):
        assert_same_step(got, whole(Problem()))
    with pytest.raises(AssertionError):
        assert_same_step(run_step(Layout(), Problem(num_sequences=4)), whole(Problem()))
