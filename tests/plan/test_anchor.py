"""Anchors: a measured step, a timeline of --profile-pipeline, a report of the GPU tests; and what none of them is."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_megatron.pipeline.trace import write_trace
from dsv3_megatron.plan import __main__ as command
from dsv3_megatron.plan import anchor, deepseek, proxy
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.parameters import counts_of_sizes
from dsv3_megatron.plan.published import RUNS
from dsv3_megatron.plan.step import Plan, plan

RUN = next(run for run in RUNS if run.name == "8 B200, BF16, 4 layers, PP2 EP4, all-to-all, 8 microbatches")
GPU = GPUS["b200"]


def planned(gpu=GPU, job=RUN.job) -> Plan:
    return plan(job, gpu, RUN.counts)


def report(path: Path, device: str = "NVIDIA B200", **figures: object) -> Path:
    """As `tests/gpu/report.py` writes it."""
    said = {"copy_GB_per_s": 6000, "bf16_TFLOP_per_s": 1500} | figures
    tests = [
        {"test": name, "result": "passed", "figures": {name: value}} for name, value in said.items() if value
    ]
    path.write_text(json.dumps({"format": 1, "device": device, "steps": {"speeds": {"tests": tests}}}))
    return path


@pytest.mark.parametrize("steps", [[1], {"speeds": 5}, {"speeds": {"tests": [{"figures": 5}]}}])
def test_a_report_of_another_form_is_refused(tmp_path: Path, steps: object) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"device": "NVIDIA B200", "steps": steps}))
    with pytest.raises(PlanError, match=r"no report of make test-gpu"):
        anchor.read(file)


def test_a_measured_step_is_what_the_plan_then_takes() -> None:
    speed = anchor.speed_of(RUN.job, GPU, RUN.counts, 1.2 * planned().step_s)
    assert planned(anchor.scaled(GPU, speed)).step_s == pytest.approx(1.2 * planned().step_s, rel=2e-3)
    # What is no speed stays: of a chip, and of seconds.
    scaled = anchor.scaled(GPU, 0.5).achieved
    assert scaled.flops_per_clock == GPU.achieved.flops_per_clock and scaled.latency == GPU.achieved.latency
    assert scaled.hbm == GPU.achieved.hbm / 2


def test_a_timeline_of_the_planned_job(tmp_path: Path) -> None:
    slower = [e._replace(start=1.3 * e.start, end=1.3 * e.end) for e in planned().simulation.events]
    file = tmp_path / "pipeline_step3.json"
    write_trace(file, {"measured": slower, "simulated": planned().simulation.events}, 1e6)
    measured = anchor.read(file)
    assert isinstance(measured, anchor.Measured) and measured.words is None and measured.step_s is None
    speed = anchor.speed_of_timeline(file, RUN.job, GPU, RUN.counts, measured.timeline)
    found = planned(anchor.scaled(GPU, speed)).simulation
    wanted = 1.3 * sum(e.end - e.start for e in planned().simulation.events)
    assert sum(e.end - e.start for e in found.events) == pytest.approx(wanted, rel=2e-3)
    with pytest.raises(PlanError, match=r"2 pipeline ranks and 32 actions, the planned job 2 and 16"):
        half = replace(RUN.job, global_batch_size=RUN.job.global_batch_size // 2)
        anchor.speed_of_timeline(file, half, GPU, RUN.counts, measured.timeline)
    # Of another job, that the file names.
    (tmp_path / "of.json").write_text(json.dumps({"plan": ["model=x"], "timeline": file.name}))
    other = anchor.read(tmp_path / "of.json")
    assert isinstance(other, anchor.Measured) and other.words == ("model=x",)
    assert len(other.timeline) == len(measured.timeline) > 0


def test_a_gpu_report_takes_the_place_of_the_table(tmp_path: Path) -> None:
    speeds = anchor.read(report(tmp_path / "report.json", scaled_mm_TFLOP_per_s=2500))
    assert isinstance(speeds, anchor.Speeds)
    gpu, ratios = anchor.with_speeds(tmp_path, speeds, GPU)
    assert gpu.achieved.hbm == pytest.approx(6000e9 / GPU.hbm)
    assert gpu.achieved.bf16_gemm == pytest.approx(1500e12 / GPU.bf16)
    assert gpu.achieved.fp8_gemm == pytest.approx(2500e12 / GPU.fp8)
    assert ratios["bf16_gemm"] == pytest.approx(gpu.achieved.bf16_gemm / GPU.achieved.bf16_gemm)
    assert planned(gpu).step_s < planned().step_s
    # Without FP8 its fraction goes with BF16's.
    speeds = anchor.read(report(tmp_path / "report.json"))
    assert isinstance(speeds, anchor.Speeds)
    gpu, ratios = anchor.with_speeds(tmp_path, speeds, GPU)
    assert ratios["fp8_gemm"] == pytest.approx(ratios["bf16_gemm"])
    with pytest.raises(PlanError, match="measured on b200, planned on h100"):
        anchor.with_speeds(tmp_path, speeds, GPUS["h100"])
    speeds = anchor.read(report(tmp_path / "report.json", bf16_TFLOP_per_s=9000))
    assert isinstance(speeds, anchor.Speeds)
    with pytest.raises(PlanError, match="400% of b200's peak"):
        anchor.with_speeds(tmp_path, speeds, GPU)


def test_the_longest_name_of_a_device_counts(tmp_path: Path) -> None:
    for device, name in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA H20-3e", "h20"),
    ):
        speeds = anchor.read(report(tmp_path / "report.json", device))
        assert isinstance(speeds, anchor.Speeds) and speeds.gpu == name


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{", "cannot be read"),
        ("[1]", "holds no measurement"),
        ('{"step_s": 1}', "neither plan nor launch"),
        ('{"plan": ["a=b"]}', "step_s, positive seconds"),
        ('{"plan": ["a=b"], "step_s": -1}', "step_s, positive seconds"),
        ('{"plan": ["a=b"], "timeline": "none.json"}', "no timeline of --profile-pipeline"),
        ('{"traceEvents": [], "microsecondsPerUnit": 1}', "no timeline of --profile-pipeline"),
        ('{"device": "CPU", "steps": {}}', "a report of CPU"),
        ('{"device": "NVIDIA H100", "steps": {"s": {"tests": []}}}', "has no speeds"),
        (
            '{"device": "NVIDIA H100", "steps": {"s": {"tests": [{"figures": {"copy_GB_per_s": "not measured"}}]}}}',
            "has no speeds",
        ),
    ],
)
def test_what_is_no_anchor_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "anchor.json"
    file.write_text(text)
    with pytest.raises(PlanError) as error:
        anchor.read(file)
    assert expected in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_the_proxy_has_the_jobs_kernels() -> None:
    """On one node: its experts per rank, its microbatch, every kind of layer."""
    run = next(run for run in RUNS if run.name.startswith("256 GB200, MXFP8, PP4 VPP4 EP64, HybridEP"))
    recipe = next(proxy.recipes(run.job, GPUS["gb200"]))
    assert (recipe.dense, recipe.moe, recipe.ep, recipe.experts) == (1, 3, 4, 16)
    assert (recipe.nodes, recipe.micro_batch) == (1, run.job.micro_batch_size)
    assert recipe.batch == 8 * 4
    words = proxy.overrides(recipe, ["model=v3_671b", "schedule=dualpipe", "cluster.nodes=256"])
    assert words[0] == "model=v3_671b" and "schedule=dualpipe" not in words and "cluster.nodes=1" in words
    assert "--num-experts 16 --expert-model-parallel-size 4" in proxy.options(recipe)


def _spread(run_gpu: str = "h800", routing: tuple[int, int] = (8, 4), **sizes: int) -> tuple[int, int]:
    """Nodes and expert-parallel ranks of DeepSeek's job, with other sizes."""
    groups, chosen = routing
    layout = replace(deepseek.JOB.layout, **sizes)  # type: ignore[arg-type]
    job = replace(deepseek.JOB, layout=layout, moe_router_num_groups=groups, moe_router_group_topk=chosen)
    recipe = next(proxy.recipes(replace(job, global_batch_size=job.global_batch_size * 8), GPUS[run_gpu]))
    world = recipe.nodes * recipe.per_node
    assert world % (layout.tp * layout.cp) == 0 == world % (recipe.ep * layout.etp)
    assert recipe.experts == job.local_experts * recipe.ep >= job.sizes.moe_router_topk
    return recipe.nodes, recipe.ep


def test_a_proxy_has_as_many_nodes_as_its_sizes_need() -> None:
    assert _spread() == (1, 8)
    assert _spread(cp=32) == (4, 8)  # the group of a sequence is whole
    assert _spread(tp=8, cp=4) == (4, 8)
    assert _spread("gb200") == (1, 4)
    assert _spread(ep=256, routing=(1, 1)) == (1, 8)
    assert _spread(ep=256) == (2, 16)  # of 8 groups each has the 2 experts that the router takes of it
    assert _spread("gb200", ep=256, routing=(1, 1)) == (2, 8)  # one expert per rank, 8 experts per token


def test_a_proxy_shrinks_in_order() -> None:
    job = replace(deepseek.JOB, micro_batch_size=4, global_batch_size=4 * deepseek.JOB.global_batch_size)
    found = [(one.dense, one.moe, one.micro_batch, one.batch) for one in proxy.recipes(job, GPUS["h800"])]
    assert found == [(1, 3, 4, 256), (1, 2, 4, 256), (1, 1, 4, 256), (1, 1, 2, 128), (1, 1, 1, 64)]
    sizes = replace(job.sizes, num_moe_layers=0, num_moe_experts=0)
    dense = next(proxy.recipes(replace(job, sizes=sizes), GPUS["h800"]))
    assert (dense.dense, dense.moe) == (4, 0) and "expert" not in " ".join(proxy.overrides(dense, ()))
    assert "expert" not in proxy.options(dense) + dense.why


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_proxy_of_a_published_run_fits(run) -> None:
    """The job of the recipe, by arithmetic: one of them fits, and is a job (its batch, its stages)."""
    for recipe in proxy.recipes(run.job, GPUS[run.gpu]):
        job = proxy.small_job(run.job, recipe)
        counts = counts_of_sizes(job.sizes, job.layout.tp)
        assert job.num_microbatches == 8 and job.local_experts == run.job.local_experts
        if plan(job, GPUS[run.gpu], counts).fits:
            return
    pytest.fail("none fits")


CASES = {
    "fits in no three layers": "model=v3_671b layout=pp8_ep8 cluster=h100_1024",
    "a sequence over four nodes": "model=v3_671b layout=pp16_ep64_cp32 cluster=h800_2048",
    "tensors and a sequence": "model=v3_671b layout=pp16_ep64 cluster=h800_2048 tensor_model_parallel_size=8 "
    "context_parallel_size=4 sequence_parallel=true expert_tensor_parallel_size=1",
    "a zigzag": "model=v3_671b layout=pp16_ep64 cluster=h800_2048 schedule=zigzag pipeline_zigzag_chunks=2",
}


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_is_planned_as_it_is_printed(name: str, capsys: pytest.CaptureFixture) -> None:
    command.main([*CASES[name].split(), "--proxy"])
    typed = shlex.split(capsys.readouterr().out.splitlines()[1])
    command.main([*typed, "output=json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"]


def test_a_job_without_a_proxy_is_refused(capsys: pytest.CaptureFixture) -> None:
    words = [
        *CASES["fits in no three layers"].split(),
        "expert_model_parallel_size=1",
        "cluster.host_memory_gb=20000",
        "--proxy",
    ]
    with pytest.raises(SystemExit):
        command.main(words)
    out, err = capsys.readouterr()
    assert not out and "--proxy: its smallest job takes" in err and "of h100's 79.6" in err
