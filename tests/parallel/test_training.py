"""Several optimizer steps: losses logged on each, bit-equal copies, gradient norm (failures 2, 3, 5)."""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from tests.harness import run_distributed
from tests.parallel.common import (
    Layout,
    Problem,
    RankResult,
    build_chunks,
    collect,
    join,
    join_tensors,
    log_losses,
    prepare,
    relative_difference,
    step,
)
from tests.parallel.test_layouts import STAGES_PP2_VPP2, STAGES_PP4

NUM_STEPS = 3


def train(
    rank: int,
    world_size: int,
    layout: Layout,
    problem: Problem,
    forward_backward: Callable[..., list] | None = None,
) -> list[RankResult]:
    """`NUM_STEPS` steps of Adam through Megatron's optimizer, each logged on every rank and collected.

    Under overlap_param_gather weights are whole after the last step only.
    """
    layout.initialize()
    config = problem.config(layout)
    chunks = build_chunks(config, problem)
    counts = prepare(chunks, problem)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.1,
            clip_grad=0.5,
            use_distributed_optimizer=dict(problem.ddp).get("use_distributed_optimizer", False),
            params_dtype=torch.float32,
        ),
        chunks,
    )
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-3, 0.1 * group.get("wd_mult", 1.0)
    results = []
    for iteration in range(NUM_STEPS):
        optimizer.zero_grad()  # as the trainer does; else the first microbatch would be added twice
        batch = problem.global_batch(config.vocab_size, seed=iteration)
        losses = step(chunks, problem, batch, forward_backward)
        logged = log_losses(chunks, problem, iteration + 1)
        result = collect(chunks, losses, counts, logged)  # before the step clips the gradients
        success, norm, _ = optimizer.step()
        assert success
        if iteration == NUM_STEPS - 1 and dict(problem.ddp).get("overlap_param_gather"):
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
        weights = collect(chunks, losses, counts, logged).weights
        results.append(dataclasses.replace(result, weights=weights, grad_norm=float(norm)))
    return results


def train_all(layout: Layout, problem: Problem = Problem()):  # noqa: B008 (frozen)
    """Per step, everything merged; `join` fails where copies of a weight are not bit-equal."""
    ranks = run_distributed(train, world_size=layout.world_size, timeout=60, layout=layout, problem=problem)
    return [join([r[i] for r in ranks]) for i in range(NUM_STEPS)], ranks


@functools.cache
def whole():
    return train_all(Layout())[0]


LAYOUTS = {
    "pp2_ep2": Layout(4, pp=2, ep=2),
    "pp4": Layout(4, pp=4, stages=STAGES_PP4),
    "pp2_vpp2": Layout(2, pp=2, stages=STAGES_PP2_VPP2),
    "tp2_ep2": Layout(4, tp=2, ep=2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "pp4" else name for name in LAYOUTS]
)
def test_steps_agree_with_one_process(name) -> None:
    """Under a time limit: losses logged on every step, norm of all gradients, bit-equal copies."""
    steps, ranks = train_all(LAYOUTS[name])
    for got, expected in zip(steps, whole(), strict=True):
        gathered = torch.stack([g.double().norm() for g in got.grads.values()]).norm().item()
        assert got.grad_norm == pytest.approx(gathered, rel=1e-5)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert {r[0].grad_norm for r in ranks} == {ranks[0][0].grad_norm}
        assert got.lm_loss == pytest.approx(expected.lm_loss, rel=1e-5)
        assert got.logged == pytest.approx(expected.logged, rel=1e-4)
        assert all(torch.equal(got.counts[n], count) for n, count in expected.counts.items())
        assert got.logged.keys() == {"seq_load_balancing_loss", "mtp_1 loss"}
    first, last = steps[0], steps[-1]
    moved = [n for n, w in last.weights.items() if not torch.equal(w, first.weights[n])]
    assert len(moved) == len(last.weights)
    assert max(relative_difference(last.weights[n], whole()[-1].weights[n]) for n in moved) < 1e-3


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(4, pp=2), id="pp2"),
        pytest.param(Layout(4, tp=2, ep=2), id="tp2_ep2", marks=pytest.mark.slow),
    ],
)
def test_zero_1_trains_the_same_weights(layout) -> None:
    """Sharded gradients have the same norm; weights are bit-equal on all ranks that hold them."""
    sharded = Problem(ddp=(("use_distributed_optimizer", True),))
    ranks = run_distributed(train, world_size=4, timeout=60, layout=layout, problem=sharded)
    for rank in ranks:
        norms = [step.grad_norm for step in rank]
        assert norms == pytest.approx([step.grad_norm for step in whole()], rel=1e-4)
    weights = join_tensors([rank[-1].weights for rank in ranks], "weight")
    assert max(relative_difference(weights[n], w) for n, w in whole()[-1].weights.items()) < 1e-3
    # The MTP stage's copy of the embedding is among those compared.
    holders = sum("embedding.word_embeddings.weight" in rank[-1].weights for rank in ranks)
    assert holders == 4


def test_gradient_norm_without_one_expert_would_differ() -> None:
    """The norm test can fail: leaving out one rank's experts moves the norm by more than its tolerance."""
    got = whole()[0]
    norms = {n: g.double().norm() for n, g in got.grads.items()}
    full = torch.stack(list(norms.values())).norm()
    partial = torch.stack([v for n, v in norms.items() if ".experts.7." not in n]).norm()
    assert abs(partial / full - 1) > 1e-4
