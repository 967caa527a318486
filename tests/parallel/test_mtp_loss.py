"""MTP loss with uneven valid tokens against one explicit sum over the global batch (known failure 1)."""

import functools

import pytest
import torch
from torch import Tensor

from dsv3_megatron import patching
from dsv3_megatron.specs.names import global_names, named_weights, unwrap
from tests.harness import run_distributed
from tests.parallel.common import Layout, Problem, build_chunks, relative_difference, run_step, train_rank
from tests.parallel.common import join as join_ranks

UNEVEN = (16, 3, 9, 16, 5, 12, 1, 14)
LAMBDA = 0.3


def problem(per_token: bool, micro_batch_size: int = 1) -> Problem:
    return Problem(
        valid_tokens=UNEVEN,
        per_token_loss=per_token,
        micro_batch_size=micro_batch_size,
        overrides=(("moe_aux_loss_coeff", 0.0),),
    )


def explicit(rank: int, world_size: int, problem: Problem) -> tuple[dict[str, Tensor], float, float]:
    """Gradients of main + λ·MTP written out over the whole batch, and both means."""
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    Layout().initialize()
    config = problem.config(Layout())
    (chunk,) = build_chunks(config, problem)
    model = unwrap(chunk)
    MTPLossAutoScaler.set_loss_scale(torch.tensor(0.0))  # Megatron's own MTP gradient: none
    recorded: list[Tensor] = []
    compute = model.compute_language_model_loss

    def record(labels: Tensor, logits: Tensor) -> Tensor:
        recorded.append(compute(labels, logits))
        return recorded[-1]

    model.compute_language_model_loss = record
    batch = problem.global_batch(config.vocab_size)
    model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    mtp_loss, main_loss = recorded
    mask = batch["loss_mask"]
    shifted = torch.zeros_like(mask)
    shifted[:, :-1] = mask[:, 1:]
    main, mtp = (main_loss * mask).sum(1), (mtp_loss * shifted).sum(1)
    if problem.per_token_loss:
        total = (main + LAMBDA * mtp).sum() / mask.sum()
    else:  # the mean over microbatches of means over their tokens
        per_microbatch = (main + LAMBDA * mtp).view(-1, problem.micro_batch_size).sum(1)
        tokens = mask.sum(1).view(-1, problem.micro_batch_size).sum(1)
        total = (per_microbatch / tokens).mean()
    weights = {n: w for n, w in named_weights(model).items() if w.requires_grad}
    names = global_names(model)
    gradients = torch.autograd.grad(total, list(weights.values()))
    by_name = {names[n].name: g for n, g in zip(weights, gradients, strict=True)}
    return by_name, float(main.sum() / mask.sum()), float(mtp.sum() / shifted.sum())


@functools.cache
def reference(problem: Problem) -> tuple[dict[str, Tensor], float, float]:
    return run_distributed(explicit, world_size=1, problem=problem)[0]


CASES = [
    (Layout(), True, 1),
    (Layout(2), True, 1),
    (Layout(2), True, 2),
    (Layout(2), False, 1),
    (Layout(4, pp=2, ep=2), True, 1),
    (Layout(4, pp=2), False, 2),
    (Layout(2, cp=2), True, 1),
    (Layout(2, tp=2), True, 2),
]


@pytest.mark.parametrize("layout, per_token, micro_batch_size", CASES)
def test_loss_and_gradients_match_the_explicit_sum(layout, per_token, micro_batch_size) -> None:
    case = problem(per_token, micro_batch_size)
    gradients, main, mtp = reference(case)
    got = run_step(layout, case)
    assert got.lm_loss == pytest.approx(main, rel=1e-5)
    assert got.logged["mtp_1 loss"] == pytest.approx(mtp, rel=1e-5)
    assert got.grads.keys() == gradients.keys()
    worst = max((relative_difference(got.grads[n], gradients[n]), n) for n in gradients)
    assert worst[0] <= 1e-5, worst


def unpatched(rank: int, world_size: int, **kwargs) -> object:
    patching.unload("mtp_loss")
    patching.unload("mtp_loss_logging")
    return train_rank(rank, world_size, **kwargs)


def test_megatrons_own_scaling_is_noticed() -> None:
    """Without the patches, two ranks with uneven tokens get another gradient and log another MTP loss."""
    case = problem(per_token=True)
    gradients, _, mtp = reference(case)
    got = join_ranks(run_distributed(unpatched, world_size=2, layout=Layout(2), problem=case))
    name = "mtp.layers.0.eh_proj.weight"
    assert relative_difference(got.grads[name], gradients[name]) > 1e-2
    assert got.logged["mtp_1 loss"] != pytest.approx(mtp, rel=1e-3)
