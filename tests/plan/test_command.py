"""`python -m dsv3_megatron.plan`: its JSON, its errors, its pictures and its speed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.conf import compose
from dsv3_megatron.pipeline.trace import read_trace, write_trace
from dsv3_megatron.plan import __main__ as command
from dsv3_megatron.plan import pictures
from dsv3_megatron.plan import search as search_command
from dsv3_megatron.plan.from_config import from_config
from dsv3_megatron.plan.memory import GIB
from dsv3_megatron.plan.step import plan

PUBLISHED = ["model=v3_671b", "layout=pp16_ep64", "cluster=h800_2048"]
PLAIN = [*PUBLISHED, "schedule=1f1b", "precision=bf16"]
KEYS = {"step_s", "tokens_per_s_per_gpu", "gpu_hours_per_1t", "days_per_1t", "bubble_s", "memory_gib", "fits"}
KEYS |= {
    "host_save_gib",
    "host_load_gib",
    "host_average_gib",
    "host_optimizer_gib",
    "memory_margin_gib",
    "confidence",
}


def _json(capsys: pytest.CaptureFixture, words: list[str]) -> dict:
    command.main([*words, "output=json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_json(capsys: pytest.CaptureFixture) -> None:
    plain, published = _json(capsys, PLAIN), _json(capsys, PUBLISHED)
    assert plain.keys() == published.keys() == KEYS
    assert len(published["memory_gib"]) == 16
    assert published["step_s"] == pytest.approx(19.926, rel=0.05)
    assert published["tokens_per_s_per_gpu"] == pytest.approx(1542, rel=0.05)
    assert published["fits"] is True and plain["fits"] is False
    half = _json(capsys, [*PUBLISHED, "global_batch_size=7680"])
    assert 0.5 < half["step_s"] / published["step_s"] < 0.6  # the bubble and the update do not halve
    assert half["days_per_1t"] > published["days_per_1t"]


def test_dispatch_as_launched(capsys: pytest.CaptureFixture) -> None:
    """DeepEP is planned for on a machine without it; bf16 through it is faster than E4M3 by all-to-all."""
    flex = [*PUBLISHED, "moe_token_dispatcher_type=flex"]
    steps = [
        _json(capsys, words)["step_s"]
        for words in (flex, [*flex, "fp8_dispatch=bf16"], [*PUBLISHED, "moe_token_dispatcher_type=alltoall"])
    ]
    assert steps == sorted(steps) and len(set(steps)) == 3
    two_hop = _json(capsys, PUBLISHED)["step_s"]  # the layout's
    assert steps[0] < two_hop < 1.02 * steps[0]
    command.main([*flex, "fp8_dispatch=bf16", "moe_flex_dispatcher_backend=hybridep"])
    assert "flex, BF16, one copy per node: " in capsys.readouterr().out
    command.main(PUBLISHED)
    assert "two_hop, E4M3, one copy per node: " in capsys.readouterr().out


def test_table_says_what_would_make_it_fit(capsys: pytest.CaptureFixture) -> None:
    command.main([*PLAIN, "tokens=14.8e12", "price=2"])
    out = capsys.readouterr().out
    assert "does not fit" in out and "what would make it fit:" in out
    assert "precision=fp8_dsv3" in out and "GPU-hours" in out and "$" in out


@pytest.mark.parametrize(
    "words, expected",
    [
        ([*PUBLISHED, "tokens=0"], "tokens=0"),
        ([*PUBLISHED, "tokens=many"], "tokens=many"),
        ([*PUBLISHED, "price=-1"], "price=-1"),
        ([*PUBLISHED, "load_imbalance=0.5"], "load_imbalance=0.5"),
        ([*PUBLISHED, "output=xml"], "output=xml"),
        (["model=v3_671b", "layout=pp16_ep64", "cluster=h900_2048"], "h900_2048"),
        (["model=v3_671b", "layout=pp16_ep64", "cluster=h100_256"], "do not divide"),
        ([*PUBLISHED, "global_batch_size=1000"], "global_batch_size=1000"),
        ([*PUBLISHED, "global_batch_size=0"], "global_batch_size=0"),
        ([*PUBLISHED, "global_batch_size=1280"], "--global-batch-size"),
        (["model=tiny", "layout=cpu_pp4"], "cluster.gpu"),
        ([*PUBLISHED, "measured=x.json"], "pictures="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_names_the_option(words: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(words)
    assert exit_.value.code == 2
    assert expected in capsys.readouterr().err


def _small_plan():
    cfg = compose(
        ["model=tiny", "layout=cpu_pp4", "cluster.gpu=h100", "schedule=dualpipe", "global_batch_size=32"]
    )
    planned = from_config(cfg, 1.0)
    return plan(planned.job, planned.gpu, planned.counts)


def test_pictures(tmp_path: Path) -> None:
    result = _small_plan()
    pictures.write_all(result, tmp_path)
    for name in ("timeline", "memory", "memory_over_time"):
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == set(pictures._FILES)  # which are probed before
    events = read_trace(tmp_path / "timeline.json")["predicted"]
    assert {event.rank for event in events} == {0, 1, 2, 3}
    assert max(e.end for e in events) == pytest.approx(result.simulation.makespan, rel=1e-6)
    for rank, curve in enumerate(pictures.memory_over_time(result)):
        assert max(gib for _, gib in curve) == pytest.approx(result.memory[rank].peak / GIB)
        assert [t for t, _ in curve] == sorted(t for t, _ in curve)


def test_a_measured_timeline_is_laid_over_with_its_error(tmp_path: Path) -> None:
    result = _small_plan()
    slower = [e._replace(start=1.25 * e.start, end=1.25 * e.end) for e in result.simulation.events]
    write_trace(tmp_path / "measured.json", {"measured": slower}, microseconds_per_unit=1e6)
    text = pictures.lay_over(result.simulation.events, tmp_path / "measured.json", tmp_path)
    assert "step -20.0%" in text and "F -20.0%" in text
    both = read_trace(tmp_path / "overlay.json")
    assert both.keys() == {"measured", "predicted"}
    assert (tmp_path / "overlay.png").exists() and (tmp_path / "overlay.svg").exists()
    with pytest.raises(ValueError, match=r"measured=.*not a timeline"):
        pictures.lay_over(result.simulation.events, tmp_path / "none.json", tmp_path)


def test_a_plan_takes_less_than_two_seconds_beyond_megatron(capsys: pytest.CaptureFixture) -> None:
    _json(capsys, PUBLISHED)  # counts in the cache, Megatron imported
    begun = time.process_time()
    _json(capsys, PUBLISHED)
    assert time.process_time() - begun < 2


def test_search_command(capsys: pytest.CaptureFixture) -> None:
    words = [
        "pipeline_model_parallel_size=16",
        "expert_model_parallel_size=64",
        "tensor_model_parallel_size=1",
    ]
    words += ["context_parallel_size=1", "micro_batch_size=1", "best=3"]
    search_command.main([*PUBLISHED, "precision=fp8_dsv3", *words, "output=json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["best"][0]["step_s"] <= found["reference_step_s"] * 1.0001
    assert "schedule=dualpipe" in found["best"][0]["overrides"]
    assert found["refused"]["memory"]["count"] > 0
    # What is found is what the planner says of it, by the trainer's own arguments.
    again = _json(capsys, [*PUBLISHED, "precision=fp8_dsv3", *found["best"][0]["overrides"]])
    assert again["step_s"] == pytest.approx(found["best"][0]["step_s"])
    assert again["memory_gib"] == pytest.approx(found["best"][0]["memory_gib"])


def test_the_mathematics_imports_neither_megatron_nor_torch() -> None:
    code = (
        "import sys, dsv3_megatron.studies.planner_error, dsv3_megatron.plan.search;"
        "bad = [m for m in ('torch', 'megatron') if m in sys.modules]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
