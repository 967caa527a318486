"""What is not wrong, but slower or larger than it need be: a table of warnings about a GPU job."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dsv3_megatron.arguments.surroundings import MAX_CONNECTIONS, Surroundings
from dsv3_megatron.preflight.findings import Finding, Severity

Env = Mapping[str, str]


@dataclass(frozen=True)
class Advice:
    """`when(args, around, env)`: whether the finding is due; args are completed, not yet validated."""

    severity: Severity
    argument: str
    when: Callable[[Namespace, Surroundings, Env], bool]
    why: str
    use: str


def _te(a: Namespace) -> bool:
    return a.transformer_impl == "transformer_engine"


def _bf16_moments(a: Namespace) -> bool:
    return a.use_precision_aware_optimizer and "bf16" in (a.exp_avg_dtype, a.exp_avg_sq_dtype)


def _allocator(env: Env) -> str:
    return env.get("PYTORCH_ALLOC_CONF", "") + env.get("PYTORCH_CUDA_ALLOC_CONF", "")


ADVICE = (
    Advice(
        "warning",
        MAX_CONNECTIONS,
        lambda a, s, env: a.pipeline_schedule != "1f1b" and 8 <= s.max_connections < 32,
        "streams of computation, messages, all-to-all and gradients may share a hardware queue and wait for each other",
        f"export {MAX_CONNECTIONS}=32",
    ),
    Advice(
        "warning",
        "--manual-gc",
        lambda a, s, env: not a.manual_gc,
        "Python collects garbage on each rank when it likes, and all others wait for that rank",
        "--manual-gc --manual-gc-interval 100",
    ),
    Advice(
        "warning",
        "--moe-permute-fusion",
        lambda a, s, env: _te(a) and bool(a.num_experts) and not a.moe_permute_fusion,
        "tokens are sorted by expert in several kernels with a copy each",
        "--moe-permute-fusion",
    ),
    Advice(
        "warning",
        "--cross-entropy-loss-fusion",
        lambda a, s, env: not a.cross_entropy_loss_fusion,
        "the whole vocabulary's softmax is kept in fp32 for the backward pass",
        "--cross-entropy-loss-fusion (Megatron's native one: it refuses Transformer Engine's)",
    ),
    Advice(
        "warning",
        "--high-priority-a2a-comm-stream",
        lambda a, s, env: (
            (a.pipeline_schedule != "1f1b" or a.overlap_moe_expert_parallel_comm)
            and a.expert_model_parallel_size > 1
            and not a.high_priority_a2a_comm_stream
        ),
        "the all-to-all waits until computation leaves it an SM",
        "--high-priority-a2a-comm-stream",
    ),
    Advice(
        "warning",
        "PYTORCH_ALLOC_CONF",
        lambda a, s, env: "expandable_segments:True" not in _allocator(env),
        "the sizes of routed batches differ each step, which breaks the allocator's memory into pieces",
        "export PYTORCH_ALLOC_CONF=expandable_segments:True",
    ),
    Advice(
        "info",
        "NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME",
        lambda a, s, env: (
            s.world_size > s.ranks_per_node
            and not (env.get("NCCL_SOCKET_IFNAME") and env.get("GLOO_SOCKET_IFNAME"))
        ),
        "on machines with several network interfaces NCCL and gloo may choose one that reaches no other machine",
        "export NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME with the interface of the cluster's network",
    ),
    Advice(
        "warning",
        "--exp-avg-dtype / --exp-avg-sq-dtype",
        lambda a, s, env: _bf16_moments(a) and s.has_te and "bf16_moments_in_place" in s.lacks,
        "the installed Transformer Engine makes fp32 copies of both moments in its step: bf16 moments save memory "
        "between steps, and none at the peak",
        "Transformer Engine 2.13 or newer, or count 8 bytes more per parameter of a rank's shard",
    ),
    Advice(
        "info",
        "--gradient-accumulation-fusion",
        lambda a, s, env: a.gradient_accumulation_fusion and not s.has_apex,
        "without Apex, weight gradients of Megatron's own Linears (the output head) are added to fp32 by torch.addmm",
        "",
    ),
    Advice(
        "warning",
        "--no-gradient-accumulation-fusion",
        lambda a, s, env: a.bf16 and not a.gradient_accumulation_fusion,
        "every weight gradient is rounded to bf16 before it is accumulated (R§3.3.3 accumulates in fp32)",
        "the default, which needs no Apex",
    ),
    Advice(
        "warning",
        "--num-workers",
        lambda a, s, env: not a.mock_data and a.num_workers < 4,
        "one loader reads the microbatches of both directions for its rank",
        "--num-workers 8",
    ),
)


def advise(args: Namespace, around: Surroundings, env: Env) -> list[Finding]:
    """Every row that applies."""
    return [
        Finding(row.severity, row.argument, row.why, row.use) for row in ADVICE if row.when(args, around, env)
    ]
