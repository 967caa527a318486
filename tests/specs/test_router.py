"""`DSV3Router` behind Megatron's interface: choice, counts, bias dtype, padding, recompute, balance loss."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.specs.router import DSV3Router
from tests.harness import run_distributed
from tests.specs.test_routing import balance_loss, gate

EXPERTS, HIDDEN = 8, 12


class Solo:
    """A process group of one, or a member of a larger one whose collectives are never called."""

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def groups(**given) -> SimpleNamespace:
    return SimpleNamespace(**({name: Solo() for name in ("tp", "cp", "tp_cp", "tp_dp_cp")} | given))


def config(**changes) -> TransformerConfig:
    settings = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 3,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_router_dtype": "fp32",
        "moe_router_bias_update_rate": 0.001,
        "init_method_std": 0.5,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(settings | changes))


# DeepSeek-V2-Lite's: softmax over all experts, no groups, no bias.
V2_GATE = {
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": True,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": 1,
    "moe_router_group_topk": 1,
}


def router(pg=None, cls=DSV3Router, seed=0, **changes):
    torch.manual_seed(seed)
    made = cls(config=config(**changes), pg_collection=pg or groups())
    made.set_layer_number(1)
    get_moe_metrics_tracker().clear()
    return made


def hidden(s=6, b=2, seed=1, dtype=torch.float32) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(s, b, HIDDEN).to(dtype)


@pytest.mark.parametrize("shift", [0.0, -4.0])
def test_routes_like_the_released_gate(shift) -> None:
    """Against loops over the router's own scores; with shift −4 every biased score is negative."""
    made = router()
    made.expert_bias += torch.linspace(-0.5, 0.5, EXPERTS) + shift
    x = hidden()
    probs, routing_map = made(x)
    scores = torch.sigmoid(x.view(-1, HIDDEN) @ made.weight.detach().T)
    for t, s in enumerate(scores.tolist()):
        chosen = gate(s, made.expert_bias.tolist(), 3, 4, 2)
        assert routing_map[t].nonzero().flatten().tolist() == sorted(chosen)
        total = sum(s[e] for e in chosen)
        expected = [2.5 * s[e] / total if e in chosen else 0.0 for e in range(EXPERTS)]
        assert probs[t].tolist() == pytest.approx(expected, rel=1e-5)


def test_where_megatrons_router_differs() -> None:
    """topk 3, 2 groups: Megatron scores a group by its 3 // 2 = 1 best expert; the report by its two best."""
    logits = torch.logit(torch.tensor([0.9, 0.1, 0.6, 0.6, 0.58, 0.58, 0.3, 0.3])).view(1, 1, EXPERTS)
    with torch.no_grad():
        ours = router().routing(logits)[1]
        megatron = router(cls=TopKRouter).routing(logits)[1]
    assert ours[0].nonzero().flatten().tolist() == [2, 3, 4]
    assert megatron[0].nonzero().flatten().tolist() == [0, 2, 3]


def test_megatrons_router_cannot_count_with_a_padding_mask() -> None:
    """The reason why the counting is ours: [T, E] & [T] has no meaning."""
    megatron = router(cls=TopKRouter, moe_aux_loss_coeff=0.0)
    with pytest.raises(RuntimeError, match="must match the size"):
        megatron(hidden(), torch.zeros(6, 2, dtype=torch.bool))


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_bias_and_counts_survive_a_cast_of_the_model(cast) -> None:
    made = router()
    bias = 0.5 + 0.001 * torch.arange(EXPERTS)  # steps below bf16's resolution at 0.5
    made.expert_bias.copy_(bias)
    model = cast(torch.nn.Sequential(torch.nn.Linear(2, 2), made))
    assert model[0].weight.dtype == made.weight.dtype != torch.float32
    assert made.expert_bias.dtype == torch.float32 and torch.equal(made.expert_bias, bias)
    assert made.local_tokens_per_expert.dtype == torch.int64
    made(hidden(dtype=made.weight.dtype))
    assert made.expert_bias.dtype == torch.float32 and torch.equal(made.expert_bias, bias)
    assert made.local_tokens_per_expert.dtype == torch.int64
    again = router(seed=5).bfloat16()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.expert_bias, bias)


def test_bf16_activations_are_scored_in_fp32() -> None:
    made = router().bfloat16()
    x = hidden(dtype=torch.bfloat16)
    probs, _ = made(x)
    assert probs.dtype == torch.float32
    scores = torch.sigmoid(x.view(-1, HIDDEN).float() @ made.weight.detach().float().T)
    chosen = probs[0] > 0
    assert torch.allclose(probs[0][chosen], 2.5 * scores[0][chosen] / scores[0][chosen].sum(), rtol=1e-6)


@pytest.mark.parametrize("base", [0, 2**8, 2**16, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_exact_past_the_floats(base, dtype) -> None:
    made = router().to(dtype)
    made.local_tokens_per_expert += base
    _, routing_map = made(hidden(s=33, b=1, dtype=dtype))
    expected = [base + int(routing_map[:, e].sum()) for e in range(EXPERTS)]
    assert made.local_tokens_per_expert.tolist() == expected
    assert sum(expected) - EXPERTS * base == 33 * 3


def test_only_training_forwards_count_and_log() -> None:
    made = router()
    x = hidden()
    with torch.no_grad():
        made(x)
        made.eval()(x)
    assert made.local_tokens_per_expert.sum() == 0
    assert "seq_load_balancing_loss" not in get_moe_metrics_tracker().metrics or (
        get_moe_metrics_tracker().metrics["seq_load_balancing_loss"].values.abs().sum() == 0
    )
    made.train()(x)
    assert made.local_tokens_per_expert.sum() == 12 * 3


def recomputed(rank: int, world_size: int) -> dict:
    """One training step of a router under Megatron's activation checkpoint, and without."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    result = {}
    for mode in ("plain", "checkpoint"):
        made = router(pg=groups(tp_cp=dist.group.WORLD))
        x = hidden().requires_grad_()
        if mode == "plain":
            probs = made(x)[0]
        else:
            probs = tensor_parallel.checkpoint(lambda v, m=made: m(v)[0], False, x)
        (probs * torch.arange(EXPERTS)).sum().backward()
        logged = get_moe_metrics_tracker().metrics["seq_load_balancing_loss"].values.tolist()
        result[mode] = (made.local_tokens_per_expert.tolist(), logged, made.weight.grad, x.grad)
    return result


def test_recompute_counts_and_logs_once() -> None:
    result = run_distributed(recomputed, world_size=1)[0]
    plain, checkpoint = result["plain"], result["checkpoint"]
    assert sum(plain[0]) == 12 * 3 and plain[0] == checkpoint[0]
    assert plain[1] == checkpoint[1] and plain[1][0] > 0
    assert torch.equal(plain[2], checkpoint[2]) and torch.equal(plain[3], checkpoint[3])


@pytest.mark.parametrize("per_token", [False, True])
def test_padding_changes_neither_counts_nor_balance_loss(per_token) -> None:
    """A padded sequence against the same tokens alone."""
    changes = {"moe_aux_loss_coeff": 0.1, "calculate_per_token_loss": per_token}
    x = hidden(s=6, b=1)
    padded = torch.cat([x, hidden(s=3, b=1, seed=9)])
    mask = torch.tensor([[False]] * 6 + [[True]] * 3)
    alone, both = router(**changes), router(**changes)
    assert torch.equal(alone.weight, both.weight)
    probs, _ = alone(x)
    (probs * torch.arange(EXPERTS)).sum().backward()
    logged = get_moe_metrics_tracker().metrics["seq_load_balancing_loss"].values.clone()
    get_moe_metrics_tracker().clear()
    probs_padded, _ = both(padded, mask)
    (probs_padded[:6] * torch.arange(EXPERTS)).sum().backward()
    assert torch.equal(probs, probs_padded[:6])
    assert alone.local_tokens_per_expert.tolist() == both.local_tokens_per_expert.tolist()
    assert torch.allclose(alone.weight.grad, both.weight.grad, rtol=1e-5, atol=1e-7)
    assert torch.allclose(get_moe_metrics_tracker().metrics["seq_load_balancing_loss"].values, logged)
    # The test would notice: without the mask the counts and the loss differ.
    free = router(**changes)
    free(padded)
    assert free.local_tokens_per_expert.tolist() != both.local_tokens_per_expert.tolist()


def test_balance_loss_value_and_gradient_through_megatrons_scaler() -> None:
    """Logged value = loops / α; the gradient reaches the weight with nothing else to train it."""
    made = router(moe_aux_loss_coeff=0.1)
    x = hidden()
    probs, _ = made(x)
    logged = get_moe_metrics_tracker().metrics["seq_load_balancing_loss"].values
    scores = torch.sigmoid(x.double() @ made.weight.detach().double().T)
    expected = sum(balance_loss(scores[:, q].tolist(), 3, 1.0) for q in range(2)) / 2
    assert logged[0].item() == pytest.approx(expected, rel=1e-5) and logged[1] == 0
    (probs * 0).sum().backward()
    weight = made.weight.detach().double().requires_grad_()
    scores = torch.sigmoid(x.double() @ weight.T)
    loss = torch.zeros((), dtype=torch.float64)
    for q in range(2):
        chosen = torch.zeros(EXPERTS, dtype=torch.float64)
        for s in scores[:, q].tolist():
            for e in gate(s, [0.0] * EXPERTS, 3, None, None):
                chosen[e] += 1
        share = (scores[:, q] / scores[:, q].sum(-1, keepdim=True)).mean(0)
        loss = loss + 0.1 * (chosen * EXPERTS / (3 * 6) * share).sum() / 2
    loss.backward()
    assert torch.allclose(made.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-8)


def balance_over_ranks(rank: int, world_size: int, per_token: bool) -> tuple:
    """A rank's router gradient when the sequence (with padding at its end) is split over the ranks."""
    group = dist.group.WORLD
    made = router(pg=groups(tp_cp=group), moe_aux_loss_coeff=0.1, calculate_per_token_loss=per_token)
    x, mask = hidden(s=8), torch.zeros(8, 2, dtype=torch.bool)
    mask[5:, 0] = True
    part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    probs, _ = made(x[part], mask[part])
    (probs * 0).sum().backward()
    logged = get_moe_metrics_tracker().metrics["seq_load_balancing_loss"].values[0]
    total = torch.cat([made.weight.grad.flatten(), logged.view(1)])
    dist.all_reduce(total)
    dist.all_reduce(made.local_tokens_per_expert)
    return total, made.local_tokens_per_expert.tolist()


@pytest.mark.parametrize("per_token", [False, True])
def test_a_split_sequence_gives_the_whole_sequences_loss(per_token) -> None:
    (whole, counts), *_ = run_distributed(balance_over_ranks, world_size=1, per_token=per_token)
    for split, split_counts in run_distributed(balance_over_ranks, world_size=2, per_token=per_token):
        assert torch.allclose(split, whole, rtol=1e-5, atol=1e-7)
        assert split_counts == counts and sum(counts) == 13 * 3


def global_updates(rank: int, world_size: int, cases: list[tuple[int, float, bool]]) -> list[torch.Tensor]:
    """The bias after Megatron's own update, for cases of (base, γ, frozen).

    The ranks' counts sum to 2b, 2b + 1, 2b + 1, 2b − 1 and four times 2b: the mean is 2b + 1/8.
    """
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    biases = []
    for base, rate, frozen in cases:
        made = router()
        made.frozen_expert_bias = frozen
        made.expert_bias += 0.25
        counts = [[base, base, base + 1, base - 1], [base, base + 1, base, base]][rank] + [base] * 4
        made.local_tokens_per_expert.copy_(torch.tensor(counts))
        model = torch.nn.Sequential(made)
        cfg = config(moe_router_bias_update_rate=rate)
        _update_router_expert_bias([model], cfg, tp_dp_cp_group=dist.group.WORLD)
        biases.append(made.expert_bias)
    return biases


def test_update_over_ranks_is_exact_and_can_be_switched_off() -> None:
    cases = [(2**power, 0.001, False) for power in (8, 16, 24, 26)]
    cases += [(2**8, 0.0, False), (2**8, 0.001, True)]
    moved = torch.full((EXPERTS,), 0.25) + 0.001 * torch.tensor([1.0, -1, -1, 1, 1, 1, 1, 1])
    for biases in run_distributed(global_updates, world_size=2, cases=cases):
        for case, bias in zip(cases, biases, strict=True):
            expected = moved if case[1] and not case[2] else torch.full((EXPERTS,), 0.25)
            assert torch.equal(bias, expected), case


def test_megatrons_own_update_would_round(monkeypatch) -> None:
    """Why the patch is there: the original, given the same integers, moves close experts the wrong way."""
    original = moe_utils.get_updated_expert_bias.__wrapped__
    counts = torch.tensor([2**25, 2**25 + 1, 2**25 + 1, 2**25 - 1] + [2**25] * 4)
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: None)
    group = Solo()
    moved = original(counts.clone(), torch.zeros(EXPERTS), 1.0, group)
    assert moved.tolist() != [1, -1, -1, 1, 1, 1, 1, 1]
    exact = moe_utils.get_updated_expert_bias(counts.clone(), torch.zeros(EXPERTS), 1.0, group)
    assert exact.tolist() == [1, -1, -1, 1, 1, 1, 1, 1]


def test_mask_of_all_tensor_parallel_ranks_is_cut_and_a_wrong_one_refused() -> None:
    made = router(pg=groups(tp=Solo(2, 1)))
    mask = torch.zeros(12, 2, dtype=torch.bool)
    mask[6:9] = True  # the first half of rank 1's six positions
    _, routing_map = made(hidden(), mask)
    assert made.local_tokens_per_expert.tolist() == routing_map[6:].sum(0).tolist()
    with pytest.raises(ValueError, match="padding_mask covers 7 positions"):
        made(hidden(), mask[:7])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False}, "score_function"),
        (
            V2_GATE | {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
            "moe_router_num_groups=4.*best expert",
        ),
        (
            V2_GATE | {"moe_router_pre_softmax": False},
            "moe_router_pre_softmax=False.*--moe-router-pre-softmax",
        ),
        ({"moe_router_load_balancing_type": "aux_loss"}, "moe_router_load_balancing_type='aux_loss'"),
        ({"moe_z_loss_coeff": 1e-3}, "moe_z_loss_coeff=0.001"),
        ({"moe_input_jitter_eps": 0.1}, "moe_input_jitter_eps=0.1"),
        ({"add_bias_linear": True}, "add_bias_linear=True.*--disable-bias-linear"),
        ({"moe_router_num_groups": 8, "moe_router_group_topk": 4}, "moe_router_num_groups=8"),
        ({"moe_router_dtype": None, "params_dtype": torch.bfloat16, "bf16": True}, "--moe-router-dtype fp32"),
    ],
)
def test_other_routing_is_refused_by_name(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        router(**changes)


def test_fp64_model_is_routed_in_fp64() -> None:
    made = router(moe_router_dtype="fp64").double()
    assert made.expert_bias.dtype == torch.float32
    probs, _ = made(hidden(dtype=torch.float64))
    assert probs.dtype == torch.float64
    assert probs.sum(-1).tolist() == pytest.approx([2.5] * 12, rel=1e-13)
