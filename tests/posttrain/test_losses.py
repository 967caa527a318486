"""The losses against written-out formulas and, slower, against TRL's trainers; values and gradients in fp64."""

import math
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron.posttrain import dpo_loss, group_advantages, grpo_loss
from dsv3_megatron.posttrain.policy_loss import grpo_terms, truncated_weights
from dsv3_megatron.posttrain.preference_loss import sequence_sums

TOLERANCE = 1e-6


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(seed: int = 0) -> list[Tensor]:
    """Four [5]: policy's and reference's of chosen and rejected."""
    return [-20 + numbers(5, seed=seed + i, scale=3.0) for i in range(4)]


def with_gradients(function: Any, *inputs: Tensor) -> tuple[float, list[Tensor]]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    value = function(*leaves)
    assert value.dim() == 0
    return float(value), list(torch.autograd.grad(value, leaves, allow_unused=True))


def assert_same(got: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]]) -> None:
    assert got[0] == pytest.approx(expected[0], abs=TOLERANCE, rel=TOLERANCE)
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


# DPO

LENGTHS = (torch.tensor([3, 1, 8, 5, 2]), torch.tensor([4, 4, 1, 9, 7]))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "ipo": {"loss": "ipo"},
    "normalised": {"chosen_lengths": LENGTHS[0], "rejected_lengths": LENGTHS[1]},
    "normalised ipo": {"loss": "ipo", "chosen_lengths": LENGTHS[0], "rejected_lengths": LENGTHS[1]},
}


def written_out(
    pc: float, pr: float, rc: float, rr: float, beta: float, how: dict[str, Any], pair: int
) -> float:
    w, l = pc - rc, pr - rr  # noqa: E741 - the paper's letters
    if "chosen_lengths" in how:
        w, l = w / int(how["chosen_lengths"][pair]), l / int(how["rejected_lengths"][pair])  # noqa: E741
    if how.get("loss") == "ipo":
        return (w - l - 1 / (2 * beta)) ** 2
    smooth = how.get("label_smoothing", 0.0)
    sigma = 1 / (1 + math.exp(-beta * (w - l)))
    return -(1 - smooth) * math.log(sigma) - smooth * math.log(1 - sigma)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_is_the_formula_and_its_gradient_the_differences(variant: str, beta: float) -> None:
    how, inputs = VARIANTS[variant], sums()
    value, gradients = with_gradients(lambda a, b, c, d: dpo_loss(a, b, c, d, beta, **how), *inputs)

    def formula(pc: list[float], pr: list[float]) -> float:
        rc, rr = inputs[2].tolist(), inputs[3].tolist()
        return sum(written_out(pc[i], pr[i], rc[i], rr[i], beta, how, i) for i in range(5)) / 5

    chosen, rejected = inputs[0].tolist(), inputs[1].tolist()
    assert value == pytest.approx(formula(chosen, rejected), abs=1e-12)
    step = 1e-6
    for i in range(5):
        up, down = ([c + sign * step * (j == i) for j, c in enumerate(chosen)] for sign in (1, -1))
        assert float(gradients[0][i]) == pytest.approx(
            (formula(up, rejected) - formula(down, rejected)) / (2 * step), abs=TOLERANCE
        )
        up, down = ([c + sign * step * (j == i) for j, c in enumerate(rejected)] for sign in (1, -1))
        assert float(gradients[1][i]) == pytest.approx(
            (formula(chosen, up) - formula(chosen, down)) / (2 * step), abs=TOLERANCE
        )


def test_dpo_of_the_reference_itself_is_log_two_and_large_margins_do_not_overflow() -> None:
    same = sums()[0]
    assert float(dpo_loss(same, same, same, same, 0.1)) == pytest.approx(math.log(2))
    far = torch.tensor([1e5], dtype=torch.float64)
    assert float(dpo_loss(far, -far, far * 0, far * 0, 1.0)) == 0
    assert float(dpo_loss(-far, far, far * 0, far * 0, 1.0)) == pytest.approx(2e5)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"beta": 0.0}, "beta=0.0: must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"loss": "hinge"}, "loss='hinge': use 'sigmoid' or 'ipo'"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "IPO has none"),
        ({"chosen_lengths": LENGTHS[0]}, "give both or none"),
        (
            {"chosen_lengths": LENGTHS[0], "rejected_lengths": LENGTHS[1][:2]},
            "rejected_lengths (2,): not of the shape (5,)",
        ),
    ],
)
def test_dpo_refuses_constants_out_of_range(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        dpo_loss(*sums(), **{"beta": 0.1, **change})
    empty = torch.zeros(0)
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(empty, sums()[0], sums()[1], empty, beta=0.1)
    with pytest.raises(ValueError, match="no pairs"):
        dpo_loss(empty, empty, empty, empty, 0.1)


# GRPO


def batch(seed: int = 0) -> dict[str, Any]:
    """Six sequences of 9 tokens, some short, off policy: ratios on both sides of the clip."""
    mask = torch.zeros(6, 9)
    for row, length in enumerate((9, 4, 1, 7, 2, 9)):
        mask[row, :length] = 1
    return {
        "logp": -2 + numbers(6, 9, seed=seed),
        "old_logp": -2 + numbers(6, 9, seed=seed + 1),
        "ref_logp": -2 + numbers(6, 9, seed=seed + 2),
        "advantages": numbers(6, seed=seed + 3),
        "mask": mask,
    }


def grpo_by_hand(given: dict[str, Any], clip: float, beta: float, reduction: str) -> float:
    rows = []
    for i in range(6):
        terms = []
        for t in range(9):
            if not given["mask"][i, t]:
                continue
            new, old, ref = (float(given[name][i, t]) for name in ("logp", "old_logp", "ref_logp"))
            a, rho = float(given["advantages"][i]), math.exp(new - old)
            d = math.exp(ref - new) - (ref - new) - 1
            terms.append(-(min(rho * a, min(max(rho, 1 - clip), 1 + clip) * a) - beta * d))
        rows.append(terms)
    if reduction == "token":
        return sum(map(sum, rows)) / sum(map(len, rows))
    return sum(sum(row) / len(row) for row in rows) / len(rows)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("clip, beta", [(0.2, 0.04), (10.0, 0.001), (0.2, 0.0)])
def test_grpo_is_the_formula_and_its_gradient_the_differences(
    reduction: Any, clip: float, beta: float
) -> None:
    given = batch()
    rest = {name: value for name, value in given.items() if name != "logp"}
    value, (gradient,) = with_gradients(
        lambda logp: grpo_loss(logp, **rest, clip=clip, beta=beta, reduction=reduction), given["logp"]
    )
    assert value == pytest.approx(grpo_by_hand(given, clip, beta, reduction), abs=1e-12)
    choose, step = random.Random(0), 1e-6
    for _ in range(12):
        i, t = choose.randrange(6), choose.randrange(9)
        values = []
        for sign in (1, -1):
            moved = given["logp"].clone()
            moved[i, t] += sign * step
            values.append(grpo_by_hand({**given, "logp": moved}, clip, beta, reduction))
        assert float(gradient[i, t]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=TOLERANCE)
    other = "sequence" if reduction == "token" else "token"
    assert abs(value - grpo_by_hand(given, clip, beta, other)) > 1e-3  # the two are told apart


def test_the_first_step_on_policy_is_reinforce() -> None:
    """Ratio 1, KL 0, gradient −A / tokens (posttrain reference)."""
    given = batch()
    same = {**given, "old_logp": given["logp"], "ref_logp": given["logp"]}
    rest = {name: value for name, value in same.items() if name != "logp"}
    _, (gradient,) = with_gradients(lambda logp: grpo_loss(logp, **rest, clip=0.2, beta=0.04), given["logp"])
    expected = -given["advantages"][:, None] * given["mask"] / given["mask"].sum()
    torch.testing.assert_close(gradient, expected)
    terms = grpo_terms(**same, clip=0.2, beta=0.04)
    assert float(terms.kl.abs().max()) == 0 and set(terms.ratio.unique().tolist()) == {0.0, 1.0}


def test_what_is_masked_is_never_looked_at() -> None:
    given = batch()
    value, gradient = with_gradients(
        lambda logp: grpo_loss(logp, **_rest(given), clip=0.2, beta=0.04), given["logp"]
    )
    broken = {name: torch.where(given["mask"] == 0, math.nan, v) for name, v in given.items() if v.dim() == 2}
    broken = {**given, **broken, "mask": given["mask"]}
    got = with_gradients(lambda logp: grpo_loss(logp, **_rest(broken), clip=0.2, beta=0.04), broken["logp"])
    assert_same(got, (value, gradient))
    nothing = {**broken, "mask": torch.zeros(6, 9)}
    for reduction in ("token", "sequence"):
        value, (slope,) = with_gradients(
            lambda logp, r=reduction: grpo_loss(logp, **_rest(nothing), clip=0.2, beta=0.04, reduction=r),
            broken["logp"],
        )
        assert value == 0 and not slope.any()
        none = {name: v[:0] for name, v in given.items()}
        assert float(grpo_loss(**none, clip=0.2, beta=0.04, reduction=reduction)) == 0


@pytest.mark.parametrize("far", [(-1.0, -300.0, -1.0), (-300.0, -1.0, -1.0), (-300.0, -300.0, -1.0)])
def test_tokens_that_have_become_impossible_or_certain_give_numbers(far: tuple[float, float, float]) -> None:
    """Policy, old policy, reference are 299 nats apart: in fp32 exp of that is infinite, and times advantage 0 NaN."""
    new, old, ref = (torch.full((2, 3), value) for value in far)
    for advantages in (torch.zeros(2), torch.tensor([1.0, -1.0])):
        value, (slope,) = with_gradients(
            lambda logp, a=advantages: grpo_loss(logp, old, ref, a, torch.ones(2, 3), clip=0.2, beta=0.0), new
        )
        assert math.isfinite(value) and torch.isfinite(slope).all()
        assert advantages.any() or (value == 0 and not slope.any())
    assert torch.isfinite(grpo_terms(new, old, ref, torch.zeros(2), torch.ones(2, 3), 0.2, 0.04).kl).all()


def _rest(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "logp"}


def test_importance_weights_are_truncated_and_multiply_the_policys_term_alone() -> None:
    trainer, engine = numbers(6, 9, seed=5), numbers(6, 9, seed=6)
    weights = truncated_weights(trainer, engine, 2.0)
    assert float(weights.max()) == 2.0 and torch.equal(weights, torch.exp(trainer - engine).clamp(max=2.0))
    given = batch()
    plain, penalty = (
        float(grpo_loss(**{**given, **change}, clip=0.2, beta=0.5))
        for change in ({}, {"advantages": torch.zeros(6)})
    )
    doubled = float(grpo_loss(**given, clip=0.2, beta=0.5, weights=torch.full((6, 9), 2.0)))
    assert doubled - penalty == pytest.approx(2 * (plain - penalty))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"clip": 0.0}, "clip=0.0"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"beta": math.inf}, "beta=inf"),
        ({"reduction": "mean"}, "reduction='mean'"),
        ({"advantages": torch.zeros(9)}, r"advantages \(9,\): not of the shape \(6, 9\)"),
        ({"ref_logp": None}, "needs ref_logp"),
        ({"old_logp": torch.zeros(6, 8)}, r"old_logp \(6, 8\): not of the shape"),
    ],
)
def test_grpo_refuses_what_does_not_fit(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        grpo_loss(**{**batch(), "clip": 0.2, "beta": 0.1, **change})


# Advantages


def test_advantages_have_the_deviation_that_is_named() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        group_advantages(rewards)[0], torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
    )
    sample = group_advantages(rewards, "sample", 1e-4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(sample, expected)
    assert not torch.allclose(sample, group_advantages(rewards), rtol=1e-2)


@pytest.mark.parametrize("deviation", ["population", "sample"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e30])
def test_a_group_of_equal_rewards_has_advantage_zero(deviation: Any, value: float) -> None:
    rewards = torch.full((2, 7), value)
    rewards[1, 3] += 1.0 if abs(value) < 2 else 1e30
    advantages = group_advantages(rewards, deviation)
    assert not advantages[0].any() and torch.isfinite(advantages).all() and advantages[1, 3] > 0
    assert not group_advantages(torch.ones(3, 1), deviation).any()  # a group of one


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_advantages_refuse_rewards_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        group_advantages(torch.tensor([[0.0, bad]]))


# Sums


def test_sums_by_sequence_leave_out_what_is_of_none() -> None:
    values, of = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1, -1, 0, 1])
    assert sequence_sums(values, of, 3).tolist() == [4.0, 9.0, 0.0]


# TRL


class TableModel(torch.nn.Module):
    """Answers TRL's forward passes with log-probabilities that are given."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def forward(self, **unused: Any) -> Any:
        nothing = torch.zeros_like(self.log_probs.detach())
        return SimpleNamespace(
            log_probs=self.log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )


class Alone:
    """Accelerate's part for one process."""

    device = torch.device("cpu")
    sync_gradients = True
    num_processes = 1

    def gather(self, value: Tensor) -> Tensor:
        return value

    def gather_for_metrics(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str = "sum") -> Tensor:
        return value


class Anything(dict):
    """Metrics of any name."""

    def __missing__(self, key: str) -> Any:
        self[key] = Anything() if key in ("train", "eval") else []
        return self[key]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_dpo_equals_trl(variant: str) -> None:
    from trl import DPOTrainer

    how = VARIANTS[variant]
    kind = how.get("loss", "sigmoid")
    if "chosen_lengths" in how:
        kind = {"sigmoid": "sigmoid_norm", "ipo": "ipo"}[kind]
    elif kind == "ipo":
        pytest.skip("TRL's IPO is length-normalised")
    lengths = torch.cat(LENGTHS)
    completion = (torch.arange(12) >= 2) & (
        torch.arange(12) < 2 + lengths[:, None]
    )  # [10, 12]: two prompt tokens
    mask = completion[:, 1:]
    policy, reference = (torch.where(mask, -2 + numbers(10, 11, seed=s), 0.0) for s in (0, 1))
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Alone(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=how.get("label_smoothing", 0.0),
        use_weighting=False,
        _metrics=Anything(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    if trainer.label_smoothing:
        # TRL's `sigmoid` does not smooth; `aot_unpaired` is the smoothed form where nothing is to be sorted.
        trainer.loss_types = ["aot_unpaired"]
    ref = reference.sum(1)
    inputs = {
        "input_ids": torch.zeros(10, 12, dtype=torch.int64),
        "attention_mask": torch.ones(10, 12, dtype=torch.int64),
        "completion_mask": completion.long(),
        "ref_chosen_logps": ref[:5],
        "ref_rejected_logps": ref[5:],
    }

    def theirs(policy: Tensor) -> Tensor:
        if not trainer.label_smoothing:
            return DPOTrainer._compute_loss(trainer, TableModel(policy), inputs, False)
        # Its smoothed losses sort the pairs first: one pair at a time there is nothing to sort.
        losses = []
        for pair in range(5):
            rows = [pair, pair + 5]
            one = {name: value[rows] for name, value in inputs.items() if value.dim() == 2}
            one |= {"ref_chosen_logps": ref[[pair]], "ref_rejected_logps": ref[[pair + 5]]}
            losses.append(DPOTrainer._compute_loss(trainer, TableModel(policy[rows]), one, False))
        return torch.stack(losses).mean()

    def ours(policy: Tensor) -> Tensor:
        total = policy.sum(1)
        return dpo_loss(total[:5], total[5:], ref[:5], ref[5:], 0.3, **how)

    assert_same(with_gradients(ours, policy), with_gradients(theirs, policy))


@pytest.mark.slow
@pytest.mark.parametrize("reduction, theirs", [("token", "bnpo"), ("sequence", "grpo")])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("weighted", [False, True])
def test_grpo_equals_trl(reduction: Any, theirs: str, beta: float, weighted: bool) -> None:
    from trl import GRPOTrainer

    given = batch()
    weights = truncated_weights(numbers(6, 9, seed=7), numbers(6, 9, seed=8), 2.0) if weighted else None

    def trl(logp: Tensor) -> Tensor:
        trainer: Any = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=Alone(),
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level="token",
            beta=beta,
            loss_type=theirs,
            epsilon_low=0.2,
            epsilon_high=0.2,
            use_vllm=weighted,
            vllm_importance_sampling_correction=weighted,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
            _metrics=Anything(),
            _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros(6, 9), None),
        )
        inputs = {
            "prompt_ids": torch.zeros(6, 2, dtype=torch.int64),
            "prompt_mask": torch.ones(6, 2, dtype=torch.int64),
            "completion_ids": torch.zeros(6, 9, dtype=torch.int64),
            "completion_mask": given["mask"],
            "advantages": given["advantages"],
            "old_per_token_logps": given["old_logp"],
            "ref_per_token_logps": given["ref_logp"],
            "importance_sampling_ratio": weights,
        }
        return GRPOTrainer._compute_loss(trainer, None, inputs)

    def ours(logp: Tensor) -> Tensor:
        return grpo_loss(logp, **_rest(given), clip=0.2, beta=beta, reduction=reduction, weights=weights)

    assert_same(with_gradients(ours, given["logp"]), with_gradients(trl, given["logp"]))
