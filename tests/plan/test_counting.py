"""Parameter counts: from a few real modules, against the dry run of every stage; and their cache."""

from pathlib import Path

import pytest

from dsv3_megatron.conf import compose
from dsv3_megatron.plan import counting, deepseek
from dsv3_megatron.plan.counting import count_parameters, moe_pattern, quiet
from dsv3_megatron.plan.from_config import at_full_batch, from_config
from dsv3_megatron.plan.parameters import held_by

ETP = ["expert_tensor_parallel_size=1"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _against_the_dry_run(overrides: list[str]) -> None:
    from dsv3_megatron.dryrun import FakeWorld, weights_of

    cfg = compose([*overrides, "cluster.gpu=h800"])
    planned = from_config(cfg, load_imbalance=1.0)
    with quiet(), FakeWorld.of(at_full_batch(cfg), 0) as world:
        num_ranks = world.groups.pp.size()
        placement = world.placement
        for rank in range(num_ranks):
            real: dict[str, int] = {}
            for weight in (w for chunk in world.build_chunks(rank) for w in weights_of(chunk)):
                real[weight.kind] = real.get(weight.kind, 0) + weight.local_size
            stages = (rank,) if placement is None else placement.stages(rank)
            assert dict(held_by(planned.job, planned.counts, tuple(stages)).parts) == real, f"rank {rank}"


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["model=tiny", "layout=cpu_pp4"], marks=pytest.mark.slow),
        ["model=tiny", "layout=cpu_pp2_ep2", "schedule=dualpipe", "global_batch_size=32"],
        ["model=tiny", "layout=cpu_pp2_ep2", "tensor_model_parallel_size=2", "sequence_parallel=true", *ETP],
    ],
    ids=["pp4", "dualpipe", "tp2"],
)
def test_every_stage_weighs_what_its_modules_weigh(overrides: list[str]) -> None:
    _against_the_dry_run(overrides)


@pytest.mark.slow
def test_every_stage_of_v3() -> None:
    _against_the_dry_run(["model=v3_671b", "layout=pp16_ep64", "cluster=h800_2048", "schedule=dualpipe"])


def test_v3_by_the_pure_table() -> None:
    """The numbers that pure code has of DeepSeek-V3 are those of the real modules, and the published totals."""
    cfg = compose(["model=v3_671b", "layout=pp16_ep64"])
    assert count_parameters(cfg, 1) == deepseek.COUNTS
    without_mtp = deepseek.COUNTS.total(3, 58, 0)
    assert without_mtp == pytest.approx(671.03e9, rel=1e-4)
    assert deepseek.COUNTS.total(3, 58, 1) == pytest.approx(682.64e9, rel=1e-4)
    assert sum(moe_pattern(cfg)) == deepseek.SIZES.num_moe_layers


def test_the_cache_is_read_and_belongs_to_one_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(["model=micro", "layout=cpu_single"])
    first = count_parameters(cfg, 1)
    built = []

    def build(cfg, tp):
        built.append(cfg)
        return first

    monkeypatch.setattr(counting, "_build", build)
    assert count_parameters(cfg, 1) == first and not built
    count_parameters(compose(["model=micro", "layout=cpu_single", "train_iters=7"]), 1)
    assert not built  # shapes no module
    for change in (
        "hidden_size=64",
        "num_experts=16",
        "q_lora_rank=12",
        "vocab_size=512",
        'moe_layer_freq="([1]*4)"',
    ):
        count_parameters(compose(["model=micro", "layout=cpu_single", change]), 1)
        assert len(built) == 1, change
        built.clear()
    count_parameters(cfg, 2)
    assert len(built) == 1
