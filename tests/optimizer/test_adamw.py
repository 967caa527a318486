"""The optimizer's arithmetic against an independent AdamW, PyTorch's own, and exact rounding."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.optimizer import AdamW

HYPER: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def reference_step(p, m, v, g, t, lr, betas, eps, weight_decay, decoupled=True):
    """AdamW on Python floats, written from the paper (Loshchilov & Hutter, algorithm 2)."""
    beta1, beta2 = betas
    if not decoupled:
        g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    update = m_hat / (math.sqrt(v_hat) + eps) + (weight_decay * p if decoupled else 0.0)
    return p - lr * update, m, v


def round_to_bf16(x: float) -> float:
    """Nearest bf16, ties to even, by integer arithmetic on the fp32 bits."""
    bits = int(np.float32(x).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(np.uint32(bits).view(np.float32))


def parameter(values: torch.Tensor, grad: torch.Tensor | None = None) -> torch.nn.Parameter:
    p = torch.nn.Parameter(values.clone())
    p.grad = grad
    return p


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_each_step_matches_the_written_out_algorithm(moments, decoupled):
    generator = torch.Generator().manual_seed(0)
    p = parameter(torch.randn(40, generator=generator))
    optimizer = AdamW([p], **HYPER, adam_w_mode=decoupled, exp_avg_dtype=moments, exp_avg_sq_dtype=moments)
    stored = round_to_bf16 if moments == torch.bfloat16 else float
    rows = [(x, 0.0, 0.0) for x in p.tolist()]
    for t in range(1, 26):
        grad = torch.randn(40, generator=generator) * 10.0 ** (t % 5 - 3)
        p.grad = grad.clone()
        optimizer.step()
        rows = [
            reference_step(*row, g, t, **HYPER, decoupled=decoupled)
            for row, g in zip(rows, grad.tolist(), strict=True)
        ]
        rows = [(x, stored(m), stored(v)) for x, m, v in rows]
        expected = torch.tensor(rows, dtype=torch.float64)
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == moments
        torch.testing.assert_close(p.detach().double(), expected[:, 0], rtol=2e-6, atol=2e-7)
        for column, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            found = state[name].double()
            if moments == torch.float32:
                torch.testing.assert_close(
                    found, expected[:, column], rtol=1e-5, atol=1e-6 * float(found.abs().max())
                )
            else:  # fp32 arithmetic lands on the other side of a rounding boundary now and then: one ulp
                torch.testing.assert_close(found, expected[:, column], rtol=2**-7, atol=0.0)
                assert (found == expected[:, column]).double().mean() > 0.9
        # Follow the optimizer's stored values, so that one flipped rounding is not counted at every later
        # step.
        columns = (p.tolist(), state["exp_avg"].tolist(), state["exp_avg_sq"].tolist())
        rows = list(zip(*columns, strict=True))


def test_moments_are_rounded_to_nearest_even_once_and_after_their_use():
    # Gradients chosen so that (1-β1)·g and (1-β2)·g² with β = 0.5 fall exactly between two bf16 numbers.
    tie_down, tie_up = 1 + 2**-8, 1 + 3 * 2**-8  # between 1 and 1+2^-7; between 1+2^-7 and 1+2^-6
    p = parameter(torch.zeros(2), torch.tensor([2 * tie_down, 2 * tie_up]))
    bf16 = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    optimizer = AdamW([p], lr=1.0, betas=(0.5, 0.5), eps=0.0, **bf16)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].tolist() == [1.0, 1 + 2**-6]
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [
        round_to_bf16(2 * tie_down**2),
        round_to_bf16(2 * tie_up**2),
    ]
    # m̂/√v̂ is exactly ±1 on unrounded moments; with rounded ones it would not be.
    assert p.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("options", [{}, {"adam_w_mode": False}, {"weight_decay": 0.0}])
def test_fp32_moments_are_bit_equal_to_torch(options):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in ((7,), (33, 5), (1000,), ())]
    ours = [parameter(x) for x in values]
    theirs = [parameter(x) for x in values]
    hyper = HYPER | {k: v for k, v in options.items() if k == "weight_decay"}
    torch_class = torch.optim.Adam if options.get("adam_w_mode") is False else torch.optim.AdamW
    a, b = AdamW(ours, **{**hyper, **options}), torch_class(theirs, **hyper)
    for step in range(30):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn(x.shape, generator=generator)
            y.grad = x.grad.clone()
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] = 1e-3 * (1 + step % 7)
        a.step()
        b.step()
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(a.state[x]["exp_avg"], b.state[y]["exp_avg"])
            assert torch.equal(a.state[x]["exp_avg_sq"], b.state[y]["exp_avg_sq"])


@settings(max_examples=25)
@given(
    size=st.integers(1, 600), cuts=st.sets(st.integers(1, 599)), seed=st.integers(0, 1000), bf16=st.booleans()
)
def test_result_of_an_element_does_not_depend_on_where_its_shard_begins(size, cuts, seed, bf16):
    """Copies of one parameter at different offsets of their shards must stay bit-equal (known failure 3)."""
    generator = torch.Generator().manual_seed(seed)
    values, grads = torch.randn(size, generator=generator), torch.randn(4, size, generator=generator)
    dtype = torch.bfloat16 if bf16 else torch.float32
    bounds = [0, *sorted(c for c in cuts if c < size), size]

    def train(pieces):
        params = [parameter(values[a:b]) for a, b in pieces]
        optimizer = AdamW(params, **HYPER, exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype)
        for grad in grads:
            for p, (a, b) in zip(params, pieces, strict=True):
                p.grad = grad[a:b]
            optimizer.step()
        return torch.cat(params)

    assert torch.equal(train([(0, size)]), train(list(itertools.pairwise(bounds))))


def test_master_weights_keep_what_bf16_parameters_lose():
    p = parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=1e-4, betas=(0.9, 0.95), master_weights=True, use_decoupled_grad=True)
    exact = torch.nn.Parameter(torch.ones(8))
    reference = torch.optim.AdamW([exact], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(30):  # 30 · 1e-4 is below the bf16 spacing of 2^-8 under 1 until some steps have added up
        p.decoupled_grad = torch.ones(8)
        exact.grad = torch.ones(8)
        optimizer.step()
        reference.step()
        assert torch.equal(optimizer.state[p]["master_param"], exact)
        assert torch.equal(p, exact.bfloat16())
    assert p[0] < 1


def test_parameters_without_gradient_are_left_alone():
    a, b = parameter(torch.ones(3), torch.ones(3)), parameter(torch.ones(3))
    optimizer = AdamW([a, b], **HYPER)
    optimizer.step()
    assert torch.equal(b, torch.ones(3)) and not torch.equal(a, b)
    optimizer.zero_grad()
    assert a.grad is None


def test_nan_gradients_are_not_hidden():
    p = parameter(torch.ones(3), torch.tensor([0.0, float("nan"), float("inf")]))
    optimizer = AdamW([p], **HYPER)
    optimizer.step()
    assert p.isnan().tolist() == [False, True, True]


def trained(moments: torch.dtype, steps: int, start: dict | None = None, seed: int = 0):
    """A bf16 parameter with fp32 master weights, trained from zero moments or from a state dict."""
    generator = torch.Generator().manual_seed(seed)
    p = parameter(torch.randn(50, generator=torch.Generator().manual_seed(9)).bfloat16())
    optimizer = AdamW(
        [p],
        **HYPER,
        master_weights=True,
        use_decoupled_grad=True,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
    )
    if start is not None:
        optimizer.load_state_dict(start)
    for _ in range(steps):
        p.decoupled_grad = torch.randn(50, generator=generator)
        optimizer.step()
    return p, optimizer


def test_state_dict_is_fp32_and_has_the_names_of_transformer_engine():
    p, optimizer = trained(torch.bfloat16, 3)
    saved = optimizer.state_dict()
    # transformer_engine/pytorch/optimizers/fused_adam.py (2.20): `initialize_state`, `state_dict`, `step`.
    assert set(saved["state"][0]) == {"exp_avg", "exp_avg_sq", "master_param"}
    assert all(tensor.dtype == torch.float32 for tensor in saved["state"][0].values())
    assert set(saved["param_groups"][0]) == {
        "params",
        "lr",
        "bias_correction",
        "betas",
        "eps",
        "weight_decay",
        "step",
    }
    assert saved["param_groups"][0]["step"] == 3
    assert torch.equal(saved["state"][0]["exp_avg"], optimizer.state[p]["exp_avg"].float())


def test_continuing_from_a_state_dict_is_bit_equal():
    p, optimizer = trained(torch.bfloat16, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    generator = torch.Generator().manual_seed(7)
    grads = torch.randn(5, 50, generator=generator)
    q, resumed = trained(torch.bfloat16, 0, saved)
    for grad in grads:
        p.decoupled_grad = q.decoupled_grad = grad
        optimizer.step()
        resumed.step()
    assert torch.equal(p, q)
    for name in ("exp_avg", "exp_avg_sq", "master_param"):
        assert torch.equal(optimizer.state[p][name], resumed.state[q][name])
    # The master weights went through, not their rounding to the parameter's bf16.
    assert not torch.equal(resumed.state[q]["master_param"], q.float())


@pytest.mark.parametrize(
    ("saved_as", "loaded_as"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_states_interchange_between_moment_types(saved_as, loaded_as):
    p, optimizer = trained(saved_as, 5)
    q, other = trained(loaded_as, 0, optimizer.state_dict())
    assert other.param_groups[0]["step"] == 5
    for name in ("exp_avg", "exp_avg_sq"):
        assert other.state[q][name].dtype == loaded_as
        assert torch.equal(other.state[q][name], optimizer.state[p][name].to(loaded_as))
    assert torch.equal(other.state[q]["master_param"], optimizer.state[p]["master_param"])


def test_loaded_states_are_copies():
    _, optimizer = trained(torch.float32, 2)
    saved = optimizer.state_dict()
    before = saved["state"][0]["exp_avg"].clone()
    trained(torch.float32, 3, saved)
    assert torch.equal(saved["state"][0]["exp_avg"], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exp_avg_dtype": torch.uint8}, "--exp-avg-dtype is torch.uint8.*use fp32 or bf16"),
        ({"exp_avg_sq_dtype": torch.float16}, "--exp-avg-sq-dtype is torch.float16.*use fp32 or bf16"),
        (
            {"master_weights": True, "master_weight_dtype": torch.float16},
            "--main-params-dtype is torch.float16.*use fp32",
        ),
        (
            {"master_weights": True, "store_param_remainders": True},
            "store_param_remainders is True.*set it to False",
        ),
        ({"capturable": True}, "--optimizer-cuda-graph is set.*leave it out"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([parameter(torch.ones(2))], **options)


def test_master_weights_stored_as_remainders_are_refused():
    p, optimizer = trained(torch.bfloat16, 1)
    with pytest.raises(
        ValueError, match=r"master_param to load has type torch.int16.*store_param_remainders=False"
    ):
        optimizer.set_scaled_state(p, "master_param", torch.zeros(50, dtype=torch.int16))
