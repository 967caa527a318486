"""Published runs as people would type them: `python -m dsv3_megatron.studies.published_lines`.

All but DeepSeek's own are Megatron's, so each is a launch line of Megatron's for `dsv3 plan --launch`; the model is the
same in all of them and comes first, as a variable of the shell. What a run's software was, and no argument says
(Transformer Engine's version, how processes are bound), are the planner's own `software.NAME=VALUE`. docs/plan.md holds
the lines; a test types them.
"""

from collections.abc import Sequence

from dsv3_megatron.pipeline.build import INTERLEAVED
from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.job import Job, Software, Stage
from dsv3_megatron.plan.published import RUNS, Run

# DeepSeek-V3 without MTP, and what all runs have in common.
V3 = (
    "--num-layers 61 --moe-layer-freq ([0]*3+[1]*58) --hidden-size 7168 --ffn-hidden-size 18432 "
    "--num-attention-heads 128 --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 "
    "--qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --num-experts 256 --moe-ffn-hidden-size 2048 "
    "--moe-shared-expert-intermediate-size 2048 --moe-router-topk 8 --moe-router-num-groups 8 "
    "--moe-router-group-topk 4 --moe-router-score-function sigmoid --moe-router-load-balancing-type seq_aux_loss "
    "--moe-aux-loss-coeff 1e-4 --moe-grouped-gemm --moe-permute-fusion --swiglu --normalization RMSNorm "
    "--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope --vocab-size 129280 "
    "--seq-length 4096 --max-position-embeddings 4096 --cross-entropy-loss-fusion --bf16 --lr 1e-4 --train-iters 10 "
    "--attention-dropout 0 --hidden-dropout 0 --use-distributed-optimizer --expert-tensor-parallel-size 1"
)
# Parts of a layer that are CUDA graphs; the router's has the shared expert in it.
_GRAPHS = {"attn": "attn", "router": "moe_router", "preprocess": "moe_preprocess"}


def words(run: Run) -> list[str]:
    """Of the trainer, after the model's."""
    job, layout = run.job, run.job.layout
    said = [f"--global-batch-size {job.global_batch_size} --micro-batch-size {job.micro_batch_size}"]
    said += _model(job)
    if layout.tp > 1:
        said.append(f"--tensor-model-parallel-size {layout.tp} --sequence-parallel")
    said += [f"--pipeline-model-parallel-size {layout.pp}"] if layout.pp > 1 else []
    said += [f"--expert-model-parallel-size {layout.ep}"]
    said += [f"--pipeline-model-parallel-layout {notation(job.stages)}"] if layout.pp > 1 else []
    if _overlaps(job) and "full" not in job.recompute:
        said.append("--overlap-moe-expert-parallel-comm --delay-wgrad-compute")
    said += ["--overlap-grad-reduce"] if job.overlap_grad_reduce else []
    said += ["--overlap-param-gather"] if job.overlap_param_gather and job.overlap_grad_reduce else []
    return said + _precision(job) + _dispatcher(job) + _recompute(job) + _graphs(job)


def _overlaps(job: Job) -> bool:
    return job.layout.overlap_pairs and job.layout.schedule == INTERLEAVED


# Widths by which a model may differ from DeepSeek-V3.
_WIDTHS = {
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "moe_ffn_hidden_size": "--moe-ffn-hidden-size",
    "moe_shared_expert_intermediate_size": "--moe-shared-expert-intermediate-size",
    "moe_router_topk": "--moe-router-topk",
}


def _model(job: Job) -> list[str]:
    s, published = job.sizes, deepseek.SIZES
    dense = s.num_layers - s.num_moe_layers
    said = [f"--q-lora-rank {s.q_lora_rank}"] if s.q_lora_rank else []
    for name, option in _WIDTHS.items():
        if getattr(s, name) != getattr(published, name):
            said.append(f"{option} {getattr(s, name)}")
    if (job.moe_router_num_groups, job.moe_router_group_topk) != (8, 4):
        said.append(
            f"--moe-router-num-groups {job.moe_router_num_groups} --moe-router-group-topk {job.moe_router_group_topk}"
        )
    if (s.num_layers, s.num_moe_layers) != (published.num_layers, published.num_moe_layers):
        said.append(f"--num-layers {s.num_layers} --moe-layer-freq ([0]*{dense}+[1]*{s.num_moe_layers})")
    said += [f"--mtp-num-layers {s.mtp_num_layers}"] if s.mtp_num_layers else []
    if s.num_moe_experts != published.num_moe_experts:
        said.append(f"--num-experts {s.num_moe_experts}")
    if s.seq_length != published.seq_length:
        said.append(f"--seq-length {s.seq_length} --max-position-embeddings {s.seq_length}")
    if s.padded_vocab_size != published.padded_vocab_size:
        said.append(f"--vocab-size {s.padded_vocab_size}")
    return said


def notation(stages: Sequence[Stage]) -> str:
    """Megatron's for what each stage holds: stages that are alike and follow each other once, with their number."""
    texts = [
        "E" * one.embedding + "t" * (one.dense + one.moe) + "m" * one.mtp + "L" * one.head for one in stages
    ]
    runs: list[tuple[str, int]] = []
    for text in texts:
        if runs and runs[-1][0] == text:
            runs[-1] = text, runs[-1][1] + 1
        else:
            runs.append((text, 1))
    parts = [text if times == 1 else f"({text}|)*{times}" for text, times in runs]
    return "".join(part if part.startswith("(") else f"{part}|" for part in parts).removesuffix("|")


def _precision(job: Job) -> list[str]:
    p = job.precision
    said = [f"--fp8-format e4m3 --fp8-recipe {p.recipe}"] if p.fp8 and not p.fp4 else []
    said += ["--fp4-format e2m1 --fp4-recipe nvfp4"] if p.fp4 else []
    said += ["--fp8-param-gather"] if p.fp8_parameters else []
    said += ["--fp8-output-proj"] if p.fp8_head else []
    said += ["--grad-reduce-in-bf16"] if p.main_gradient == 2 else []
    if p.moment == 2:
        said.append("--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16")
    return said


def _dispatcher(job: Job) -> list[str]:
    if job.dispatcher != "flex":
        said = ["--moe-token-dispatcher-type alltoall"]
        if job.capacity_factor is not None:
            said.append(
                f"--moe-expert-capacity-factor {job.capacity_factor:g} --moe-pad-expert-input-to-capacity"
            )
        return said + (["--moe-shared-expert-overlap"] if job.shared_expert_overlap else [])
    said = [f"--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend {job.flex_backend}"]
    return [*said, f"--moe-{job.flex_backend}-num-sms {job.communication_sms}"]


def _recompute(job: Job) -> list[str]:
    if "full" in job.recompute:
        return ["--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"]
    modules, away = " ".join(sorted(job.recompute)), " ".join(sorted(job.offload_modules))
    said = [f"--recompute-granularity selective --recompute-modules {modules}"] if modules else []
    return said + ([f"--fine-grained-activation-offloading --offload-modules {away}"] if away else [])


def _graphs(job: Job) -> list[str]:
    said = ["--moe-router-fusion"] if job.software.router_fusion else []
    said += ["--moe-router-padding-for-quantization"] if job.software.router_padding else []
    said += [] if job.software.rope_fusion else ["--no-rope-fusion"]
    if job.whole_iteration_graph:
        return [*said, "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"]
    parts = [name for part, name in _GRAPHS.items() if part in job.software.graphs]
    return (
        [*said, f"--cuda-graph-impl transformer_engine --cuda-graph-modules {' '.join(parts)}"]
        if parts
        else said
    )


def beside(run: Run) -> list[str]:
    """The planner's own options."""
    software, usual, said = run.job.software, Software(), [f"gpu={run.gpu}"]
    said.append(f"load_imbalance={run.job.load_imbalance:g}")
    for name in ("te", "fused_attention", "cross_entropy", "norm_quantises", "bound"):
        value = getattr(software, name)
        if value != getattr(usual, name):
            text = ".".join(map(str, value)) if name == "te" else str(value).lower()
            said.append(f"software.{name}={text}")
    if run.job.precision.fp8_attention:  # no argument of Megatron's says so
        said.append("software.fp8_attention=true")
    if _overlaps(run.job) and "full" in run.job.recompute:  # which Megatron has refused since
        said.append("software.overlap_pairs=true")
    if "router" in software.graphs and "shared_experts" not in software.graphs:
        said.append(f"software.graphs=[{','.join(sorted(software.graphs))}]")
    return said


def line(run: Run) -> str:
    """As typed, with $V3 for the model."""
    gpu, num = GPUS[run.gpu], run.job.layout.num_gpus
    torchrun = f"torchrun --nnodes {num // gpu.node} --nproc-per-node {gpu.node} pretrain_gpt.py $V3"
    return f'dsv3 plan --launch "{torchrun} {" ".join(words(run))}" {" ".join(beside(run))}'


def main() -> None:
    print(f'V3="{V3}"')
    for run in RUNS:
        print(f"# {run.name}\n{line(run)}")


if __name__ == "__main__":
    main()
