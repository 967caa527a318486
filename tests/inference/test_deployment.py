"""Copies of experts, the shared expert as a routed one, overlapped halves: the tokens of the plain engine."""

import threading

import pytest
import torch

from dsv3_megatron.inference import Sampling
from dsv3_megatron.inference.redundancy import Redundancy, in_place, sources
from dsv3_megatron.inference.two_batches import Lane, interleaved
from dsv3_megatron.serve.load import Layout
from dsv3_megatron.specs.deployment import Deployment
from dsv3_megatron.specs.expert_slots import ExpertSlots, first_placement
from tests.inference.models import engine, opened, prompts, transformers_greedy, write_model

NEW = 10
DEPLOYMENTS = {
    "copies": Deployment(4),
    "shared as routed": Deployment(3, shared_as_routed=True, whole_mlps=True),
    "two halves": Deployment(microbatches=2),
    "all": Deployment(5, True, True, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hf"), mtp=True)


@pytest.fixture(scope="module")
def batch():
    return prompts(3, 19, 7, 1)


@pytest.fixture(scope="module")
def wanted(folder, batch):
    return transformers_greedy(folder, batch, NEW)[0]


@pytest.mark.parametrize(
    "name", ["all", *(pytest.param(n, marks=pytest.mark.slow) for n in DEPLOYMENTS if n != "all")]
)
def test_tokens_are_those_of_transformers(folder, batch, wanted, name):
    """Copies move after every second step; prompts go in chunks, so that halves cut requests."""
    with opened(folder, Layout(deployment=DEPLOYMENTS[name])) as model:
        for speculative in (False, True):
            running = engine(
                model,
                speculative=speculative,
                max_step_tokens=16,
                rebalance_interval=2 if DEPLOYMENTS[name].has_slots else 0,
            )
            answers = running.generate(batch, Sampling(max_new_tokens=NEW, temperature=0, ignore_ends=True))
            assert [answer.tokens for answer in answers] == wanted
            assert (running.redundancy.changed > 0) == DEPLOYMENTS[name].has_slots
            running.close()


def test_tables_that_move_without_weights_would_be_seen(folder, batch, wanted, monkeypatch):
    """The control: slots that are said to hold other experts than they do."""
    from dsv3_megatron.inference import redundancy

    monkeypatch.setattr(redundancy, "_move", lambda layer, held: layer.place(held))
    with opened(folder, Layout(deployment=DEPLOYMENTS["copies"])) as model:
        running = engine(model, rebalance_interval=2)
        answers = running.generate(batch, Sampling(max_new_tokens=NEW, temperature=0, ignore_ends=True))
        assert running.redundancy.changed > 0
        assert [answer.tokens for answer in answers] != wanted
        running.close()


def test_slots_take_every_choice_to_a_copy_in_turn():
    held = torch.tensor([0, 1, 2, 3, 0, 4, 4, 0])
    slots = ExpertSlots(held, 5, shared_as_routed=True, rank=0)
    weights, places = slots(torch.full((6, 1), 0.5), torch.zeros(6, 1, dtype=torch.int64))
    assert places[:, 0].tolist() == [0, 4, 7, 0, 4, 7] and places[:, 1].tolist() == [5, 6] * 3
    assert weights.tolist() == [[0.5, 1.0]] * 6
    assert slots.load.tolist() == [6, 0, 0, 0, 6]
    with pytest.raises(ValueError, match="every one of 5 experts"):
        slots.place(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))


def test_the_published_decoding_has_64_gpus_for_redundant_and_shared_experts():
    held = first_placement(320, 256, shared_topk=8, num_ranks=320)
    counts = held.bincount()
    assert counts[256] == 32 and int((counts[:256] - 1).sum()) == 32 and len(held) == 320
    assert int(first_placement(288, 256, None, 32).bincount().max()) == 2


@pytest.mark.parametrize("seed", range(20))
def test_experts_that_stay_on_a_rank_stay_in_their_slot(seed):
    generator = torch.Generator().manual_seed(seed)
    ranks, per_rank, experts = 4, 3, 8
    held = torch.cat([torch.arange(experts), torch.randint(experts, (4,), generator=generator)])
    wanted = held[torch.randperm(12, generator=generator)]
    placed = in_place(held, wanted, ranks)
    for now, then, asked in zip(
        held.split(per_rank), placed.split(per_rank), wanted.split(per_rank), strict=True
    ):
        assert sorted(then.tolist()) == sorted(asked.tolist())
        both = sum(min(now.tolist().count(e), asked.tolist().count(e)) for e in range(experts))
        assert sum(a == b for a, b in zip(now.tolist(), then.tolist(), strict=True)) == both
    moves = dict(sources(held, placed, ranks))
    assert sorted(moves) == [i for i in range(12) if held[i] != placed[i]]
    for slot, source in moves.items():
        assert held[source] == placed[slot]
        near = [s for s in range(12) if held[s] == placed[slot] and s // per_rank == slot // per_rank]
        assert not near or source in near


def test_one_halfs_messages_travel_beside_the_others_products():
    """Each half's product begins while the other's message is under way; messages go one after the other."""
    lane, log, under_way = Lane(torch.device("cpu")), [], threading.Event()

    def half(name):
        total = 0
        for layer in range(3):
            log.append((name, "product", layer, under_way.is_set()))

            def message(layer=layer):
                under_way.set()
                log.append((name, "message", layer, torch.is_inference_mode_enabled()))
                threading.Event().wait(0.02)
                under_way.clear()
                return layer

            total += yield message
        return torch.tensor(total)

    results = interleaved([half("a"), half("b")], lane)
    lane.close()
    assert [int(x) for x in results] == [3, 3]
    messages = [(name, layer) for name, kind, layer, _ in log if kind == "message"]
    assert messages == [(name, layer) for layer in range(3) for name in "ab"]
    assert all(in_inference for _, kind, _, in_inference in log if kind == "message")
    products = [
        beside for name, kind, layer, beside in log if kind == "product" and (name, layer) != ("a", 0)
    ]
    assert sum(products) >= len(products) - 1  # the first may begin before the thread does


@pytest.mark.parametrize(
    ("deployment", "experts", "shared", "ranks", "named"),
    [
        (Deployment(3), 8, 1, 4, "do not lie evenly on 4"),
        (Deployment(4, shared_as_routed=True), 8, 2, 4, "has 2 of them"),
        (Deployment(0, shared_as_routed=True), 8, 1, 4, "its own"),
        (Deployment(-1), 8, 1, 1, "0 or more"),
        (Deployment(4), 0, 0, 1, "no experts"),
        (Deployment(microbatches=3), 8, 1, 1, "3 microbatches"),
    ],
)
def test_impossible_deployments_are_named(deployment, experts, shared, ranks, named):
    with pytest.raises(ValueError, match=named):
        deployment.check(experts, shared, ranks)


def test_without_slots_there_is_nothing_to_balance(folder):
    with opened(folder) as model:
        assert Redundancy(model).rebalance() == 0
