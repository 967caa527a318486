"""Launch lines and scripts as GPUs would get them: planned as they are, and refused by name."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_megatron.plan import __main__ as command
from dsv3_megatron.plan.__main__ import planned_of
from dsv3_megatron.plan.confidence import confidence
from dsv3_megatron.plan.environment import attention_of, not_planned
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.options import parse
from dsv3_megatron.plan.published import RUNS

# Megatron's words of DeepSeek-V3, without --spec dsv3.
MODEL = [
    "--num-layers",
    "61",
    "--hidden-size",
    "7168",
    "--ffn-hidden-size",
    "18432",
    "--num-attention-heads",
    "128",
    "--multi-latent-attention",
    "--q-lora-rank",
    "1536",
    "--kv-lora-rank",
    "512",
    "--qk-head-dim",
    "128",
    "--qk-pos-emb-head-dim",
    "64",
    "--v-head-dim",
    "128",
    "--num-experts",
    "256",
    "--moe-router-topk",
    "8",
    "--moe-ffn-hidden-size",
    "2048",
    "--moe-shared-expert-intermediate-size",
    "2048",
    "--moe-layer-freq",
    "'([0]*3+[1]*58)'",
    "--seq-length",
    "4096",
    "--max-position-embeddings",
    "4096",
    "--swiglu",
    "--normalization",
    "RMSNorm",
    "--untie-embeddings-and-output-weights",
    "--disable-bias-linear",
    "--mtp-num-layers",
    "1",
    "--moe-router-num-groups",
    "8",
    "--moe-router-group-topk",
    "4",
    "--position-embedding-type",
    "rope",
    "--vocab-size",
    "129280",
    "--moe-grouped-gemm",
    "--qk-layernorm",
    "--moe-router-score-function",
    "sigmoid",
    "--moe-router-load-balancing-type",
    "seq_aux_loss",
    "--lr",
    "1e-4",
    "--train-iters",
    "10",
    "--micro-batch-size",
    "1",
    "--use-distributed-optimizer",
    "--bf16",
]
H100 = [
    "--tensor-model-parallel-size",
    "2",
    "--sequence-parallel",
    "--pipeline-model-parallel-size",
    "8",
    "--expert-model-parallel-size",
    "64",
    "--expert-tensor-parallel-size",
    "1",
    "--pipeline-model-parallel-layout",
    "'Ettt|(tt|)*29m|L'",
    "--global-batch-size",
    "8192",
    "--fp8-format",
    "e4m3",
    "--fp8-recipe",
    "blockwise",
    "--moe-token-dispatcher-type",
    "flex",
    "--moe-flex-dispatcher-backend",
    "deepep",
    "--overlap-moe-expert-parallel-comm",
    "--delay-wgrad-compute",
    "--recompute-granularity",
    "selective",
    "--recompute-modules",
    "mla_up_proj",
    "mlp",
    "moe_act",
    "layernorm",
    "--moe-router-fusion",
    "--moe-permute-fusion",
    "--cross-entropy-loss-fusion",
    "--cross-entropy-fusion-impl",
    "native",
    "--tokenizer-type",
    "HuggingFaceTokenizer",
    "--tokenizer-model",
    "/of/the/cluster",
    "--data-path",
    "/of/the/cluster",
    "--save",
    "/of/the/cluster",
]
TORCHRUN = ["torchrun", "--nnodes", "128", "--nproc-per-node", "8", "pretrain_gpt.py"]
CLUSTER = ["model=v3_671b", "layout=pp16_ep64"]


def line(*words: str) -> str:
    return " ".join([*TORCHRUN, *MODEL, *H100, *words])


def test_a_line_of_megatrons_is_the_published_job() -> None:
    """The H100 row of the error table as a command: the same job, so the same step."""
    run = next(run for run in RUNS if run.name.startswith("1024 H100, FP8 blockwise"))
    planned = planned_of(parse(["--launch", line(), "gpu=h100", "load_imbalance=1"]))
    job = planned.job
    assert job.sizes == run.job.sizes and job.stages == run.job.stages
    for name in (
        "recompute",
        "dispatcher",
        "flex_backend",
        "communication_sms",
        "global_batch_size",
    ):
        assert getattr(job, name) == getattr(run.job, name), name
    # Megatron has since refused Transformer Engine's fused loss, which the recipe of the run had.
    assert replace(job.software, cross_entropy="te") == run.job.software
    assert job.precision.recipe == "blockwise" and job.layout.overlap_pairs and job.layout.ep == 64
    assert planned.counts == run.counts


def test_a_script_with_variables(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "NODES=${NODES:-1}\nOPTIONS=(" + "\n".join([*MODEL, *H100]) + ")\n"
        "torchrun --nnodes $NODES --nproc-per-node 8 pretrain_gpt.py ${OPTIONS[@]} --no-such-option 3\n"
    )
    planned = planned_of(parse(["--script", str(script), "gpu=h100", "NODES=128", "load_imbalance=1"]))
    assert planned.job == planned_of(parse(["--launch", line(), "gpu=h100", "load_imbalance=1"])).job
    assert any("--no-such-option" in note for note in planned.notes)


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["--launch", "torchrun train.py --bar"],
            "starts no trainer that can be planned; use pretrain_gpt.py with",
        ),
        (["--launch", "NVTE_FUSED_ATTN=1"], "starts no trainer that can be planned"),
        (
            ["--launch", line("&& echo done")],
            "'&&' joins commands or moves files; give the trainer's command alone",
        ),
        (["--launch", line().replace("torchrun", "srun -N two", 1)], "--launch: -N two: is no whole number"),
        (
            ["--launch", f"NVTE_FUSED_ATTN=0 {line('--attention-backend fused')}"],
            "NVTE_FUSED_ATTN=0: --attention",
        ),
        (["--launch", f"NVTE_UNFUSED_ATTN=0 {line('--attention-backend auto')}"], "auto sets it to 1"),
        (["--launch", f"NVTE_FUSED_ATTN=no {line()}"], "NVTE_FUSED_ATTN=no: use NVTE_FUSED_ATTN=0 or"),
        (["--launch", f"NVTE_FUSED_ATTN=0 NVTE_FLASH_ATTN=0 NVTE_UNFUSED_ATTN=0 {line()}"], "no attention"),
        (["--launch"], "--launch: needs a launch line"),
        (["--script", "/nowhere.sh"], "/nowhere.sh"),
        (["--launch", "x", "--script", "y"], "--launch with --script"),
        (["--launch", line(), "hidden_size=3"], "hidden_size=3"),
        (["--launch", line(), "gpu=h900"], "gpu=h900"),
        (["--launch", line("--recompute-modules", "mlp", "attention")], "recompute_modules=attention"),
        (["--launch", line("--use-megatron-fsdp")], "fsdp"),
        (["--launch", line("--expert-tensor-parallel-size", "3")], "expert_tensor_parallel_size=3"),
        (["--launch", line("--hidden-size", "0")], "hidden_size=0"),
        (["--launch", line("--vocab-size", "-5")], "vocab_size=-5"),
        (["--launch", line("--num-attention-heads", "0")], "num_attention_heads=0"),
        (["--launch", line("--expert-model-parallel-size", "0")], "expert_model_parallel_size=0"),
        (["--launch", line("--moe-router-topk", "999")], "moe_router_topk=999"),
        (["--launch", line("--hidden-size", "abc")], "--hidden-size: invalid int value: 'abc'"),
        (["--launch", line(), "gpu="], "gpu=: a value is needed"),
        (["--launch", line(), "nodes=0"], "nodes=0"),
        (["--launch", line(), "load_imbalance=nan"], "load_imbalance=nan"),
        (["--launch", line(), "software.tee=2.9"], "software.tee=2.9"),
        (["--launch", line(), "software.te=new"], "software.te=new"),
        (["--launch", line(), "software.bound=maybe"], "use true or false"),
        ([*CLUSTER, "pictures="], "pictures=: a value is needed"),
        ([*CLUSTER, "software.te=2.9"], "DeepSeek's kernels"),
        (["--launch", "torchrun pretrain_gpt.py --num-layers '61"], "No closing quotation"),
        (["--launch", "nemo llm pretrain --factory deepseek_v3"], "starts no trainer"),
        ([*CLUSTER, "hidden_size=0"], "hidden_size=0"),
        ([*CLUSTER, "vocab_size=-5"], "vocab_size=-5"),
        ([*CLUSTER, "load_imbalance=100"], "load_imbalance=100"),
        ([*CLUSTER, "recompute_modules=[layernorm,foo]"], "recompute_modules=foo"),
        ([*CLUSTER, "pictures=/proc/none"], "pictures=/proc/none"),
        ([*CLUSTER, "whatif=faster"], "whatif=faster"),
        ([*CLUSTER, "anchor=/nowhere.json"], "anchor=/nowhere.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nonsense_is_refused_by_name(words: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(words)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error


def test_experts_that_ranks_share_are_planned() -> None:
    """As said, or as Megatron's default has it: as many ranks as tensor parallelism."""
    whole = line("--expert-model-parallel-size", "32", "--expert-tensor-parallel-size", "2")
    job = planned_of(parse(["--launch", whole, "gpu=h100"])).job
    assert (job.layout.ep, job.layout.etp, job.layout.expert_ranks) == (32, 2, 64)
    unsaid = whole.replace("--expert-tensor-parallel-size 1", "").replace(
        "--expert-tensor-parallel-size 2", ""
    )
    assert planned_of(parse(["--launch", unsaid, "gpu=h100"])).job == job


def test_a_public_line_with_a_loss_that_megatron_has_refused_since() -> None:
    """Megatron's GB200 guide has it: planned with that loss, and said."""
    planned = planned_of(parse(["--launch", line("--cross-entropy-fusion-impl", "te"), "gpu=h100"]))
    assert planned.job.software.cross_entropy == "te"
    assert any(note.startswith("--cross-entropy-fusion-impl te") for note in planned.notes)


def test_the_proxy_is_a_job_that_can_be_planned(capsys: pytest.CaptureFixture) -> None:
    """What --proxy prints, typed again: on one node, with the job's kernels; a run of it is an anchor."""
    words = [*CLUSTER, "cluster=h800_2048"]
    command.main([*words, "--proxy"])
    printed = capsys.readouterr().out.splitlines()
    typed, file = shlex.split(printed[1]), json.loads(printed[3])
    assert file == {"plan": typed, "step_s": "its seconds"}
    job, small = (planned_of(parse(each)).job for each in (words, typed))
    assert small.layout.num_gpus == 8 and small.layout.pp == 1 and small.num_microbatches == 8
    assert small.local_experts == job.local_experts and small.precision == job.precision
    command.main(["--launch", line(), "gpu=h100", "--proxy"])
    printed = capsys.readouterr().out.splitlines()
    layout = "--pipeline-model-parallel-layout"
    assert layout in printed[1]
    left = line().replace("128 --nproc", "1 --nproc").replace("--mtp-num-layers 1", "")
    left = re.sub(rf"{layout} \S+", "", left)
    small = planned_of(parse(["--launch", f"{left} {printed[2].strip()}", "gpu=h100"])).job
    assert small.layout.num_gpus == 8 and small.sizes.num_layers == 4 and small.local_experts == 4
    assert small.layout.tp == 2 and small.precision.recipe == "blockwise"


def test_attention_that_is_not_fused_is_slower() -> None:
    """And no published run is like it."""
    job = planned_of(parse(["--launch", line("--attention-backend", "unfused"), "gpu=h100"])).job
    assert not job.software.fused_attention
    assert "attention that is not fused" in confidence(job, GPUS["h100"]).unlike


UNFUSED = "NVTE_FUSED_ATTN=0 NVTE_FLASH_ATTN=0 NVTE_UNFUSED_ATTN=1"


def test_switches_of_attention_choose_the_backend(tmp_path: Path) -> None:
    """On the line, exported in a script, by srun; as the option that says the same."""
    job = planned_of(parse(["--launch", line("--attention-backend", "unfused"), "gpu=h100"])).job
    planned = planned_of(parse(["--launch", f"{UNFUSED} NCCL_ALGO=Ring {line()}", "gpu=h100"]))
    assert planned.job == job != planned_of(parse(["--launch", line(), "gpu=h100"])).job
    assert any("planned as --attention-backend unfused" in note for note in planned.notes)
    assert "NCCL_ALGO=Ring: not planned" in planned.notes
    script = tmp_path / "train.sh"
    script.write_text(f'nvidia-smi topo -m\nexport {UNFUSED}\n{line()} "$@" 2>&1 | tee log\n')
    planned = planned_of(parse(["--script", str(script), "gpu=h100"]))
    assert planned.job == job and not any("left out" in note for note in planned.notes)


def test_switches_alone() -> None:
    for env, backend in (
        ({"NVTE_FLASH_ATTN": "1"}, []),
        ({"NVTE_DEBUG": "1"}, []),
        ({"NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}, ["--attention-backend", "fused"]),
        ({"NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}, ["--attention-backend", "flash"]),
        ({"NVTE_FUSED_ATTN": "0", "NVTE_FLASH_ATTN": "0"}, ["--attention-backend", "unfused"]),
    ):
        words, notes = attention_of(env, ["--lr", "1"])
        assert words == ["--lr", "1", *backend] and bool(notes) == bool(backend)
        assert attention_of(
            env, words := [*words, *([] if backend else ["--attention-backend", "auto"])]
        ) == (words, [])
        assert not_planned(env) == []
    assert not_planned({"NVTE_NORM_FWD_USE_CUDNN": "1", "PATH": "x"}) == [
        "NVTE_NORM_FWD_USE_CUDNN=1: not planned; use software.norm_quantises=true"
    ]


def test_slurm_says_the_size_and_the_shell_nothing() -> None:
    """The same job as torchrun's."""
    expected = planned_of(parse(["--launch", line(), "gpu=h100"]))
    options = " ".join([*MODEL, *H100])
    whole = f"srun -N 128 --ntasks-per-node=8 python -u pretrain_gpt.py {options} 2>&1|tee log &"
    planned = planned_of(parse(["--launch", whole, "gpu=h100"]))
    assert planned.job == expected.job and planned.notes == expected.notes


@pytest.mark.parametrize("name", ["slurm_256gpu", "slurm_256gpu_hydra", "slurm_2048gpu"])
def test_our_examples_are_planned(name: str) -> None:
    script = Path(__file__).parents[2] / "examples" / f"{name}.sh"
    layout = planned_of(parse(["--script", str(script), "gpu=h200"])).job.layout
    expected = (2048, 16, 64) if "2048" in name else (256, 16, 16)
    assert (layout.num_gpus, layout.pp, layout.ep) == expected


def test_what_if_and_anchor(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run measured at twice its plan: the same job anchored on it takes as long as measured."""

    def told(*words: str) -> dict:
        command.main([*CLUSTER, "cluster=h800_2048", *words, "output=json"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    plain = told("whatif=all")
    assert len(plain["whatif"]) == 6
    assert plain["whatif"]["together"]["step_s"] < min(
        one["step_s"] for name, one in plain["whatif"].items() if name != "together"
    )
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"plan": [*CLUSTER, "cluster=h800_2048"], "step_s": 1.5 * plain["step_s"]}))
    anchored = told(f"anchor={file}")
    assert anchored["step_s"] == pytest.approx(1.5 * plain["step_s"], rel=2e-3)
    assert anchored["anchored_speed"] < 1 and anchored["memory_gib"] == plain["memory_gib"]
    file.write_text(json.dumps({"plan": CLUSTER, "step_s": 1000}))
    with pytest.raises(SystemExit):
        told(f"anchor={file}")
    assert "another job was measured" in capsys.readouterr().err
