"""What is planned: model sizes, layout, precision, recompute and batch, without Megatron."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.metrics.flops import ModelSizes
from dsv3_megatron.pipeline.build import INTERLEAVED, ZIGZAG
from dsv3_megatron.pipeline.nominal import nominal_options
from dsv3_megatron.pipeline.traits import TRAITS

# Megatron's `--fp8-recipe` and `--fp4-recipe`.
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4")
# Megatron's `--recompute-modules`, and what is recomputed as a whole.
RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")

# Of `Software`: what can be said of it beside the arguments.
CROSS_ENTROPIES = ("te", "native")
GRAPHED = ("attn", "mlp", "moe", "router", "preprocess", "shared_experts")
SOFTWARE_FLAGS = (
    "router_fusion", "permute_fusion", "rope_fusion", "router_padding", "fused_attention", "norm_quantises", "bound",
    "overlap_pairs", "fp8_attention",
)  # fmt: skip


class PlanError(RefusedArgument):
    """A job that cannot be planned; the text names the option, its value and what to use."""


@dataclass(frozen=True, kw_only=True)
class Software:
    """What of a run's software decides how many kernels there are and how long the host takes to launch them.

    Attributes:
        own_kernels: DeepSeek's: everything is fused, and nothing waits for the host; with it the rest says nothing.
        te: Transformer Engine's version.
        router_fusion, permute_fusion, rope_fusion: `--moe-router-fusion`, `--moe-permute-fusion`, no
            `--no-rope-fusion`.
        router_padding: `--moe-router-padding-for-quantization`: each expert gets as many rows as FP8 asks for; without
            it the rows are copied to where there are as many.
        fused_attention: cuDNN has MLA's head sizes on this GPU; without it whole attention matrices are written.
        cross_entropy: "te", "native" (Megatron's fused one) or "", unfused.
        norm_quantises: quantisation is fused into the norms (cuDNN's, `NVTE_NORM_FWD_USE_CUDNN`).
        bound: each process stays on the cores and memory beside its GPU (`numactl`, `bindpcie`).
        graphs: parts that are CUDA graphs: "attn", "mlp", "moe", "router", "preprocess", "shared_experts".
    """

    own_kernels: bool = False
    te: tuple[int, int] = (2, 12)
    router_fusion: bool = True
    permute_fusion: bool = True
    rope_fusion: bool = True
    router_padding: bool = False
    fused_attention: bool = True
    cross_entropy: str = "native"
    norm_quantises: bool = False
    bound: bool = True
    graphs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds.

    Attributes:
        dense, moe: decoder layers of each kind.
        mtp: multi-token-prediction layers; each passes the output head once more.
        embedding, head: whether the stage begins or ends the model.
    """

    dense: int = 0
    moe: int = 0
    mtp: int = 0
    embedding: bool = False
    head: bool = False

    @property
    def num_layers(self) -> int:
        """Decoder layers, and MTP layers, which are one more each."""
        return self.dense + self.moe + self.mtp


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Formats by their bytes per element.

    Attributes:
        compute: parameters, activations and messages between stages.
        fp8: linear layers on E4M3 operands, which are what they keep of their inputs.
        fp8_caches: attention's output in E5M6, SwiGLU's input in E4M3 with its output computed again (report §3.3.3;
            `--fp8-recipe dsv3`, not upstream in Megatron).
        fp8_dispatch: the dispatch sends E4M3 too (likewise).
        recipe: of the FP8 or FP4 operands: "dsv3", or one of `RECIPES`; "" without.
        fp8_attention: queries, keys and values in E4M3 (Transformer Engine's `fp8_dot_product_attention`).
        fp8_head: the output head too (Megatron's `--fp8-output-proj`).
        fp8_parameters: the parameters themselves are E4M3 (`--fp8-param-gather`), with no copy in `compute`.
        main_gradient, master, moment: of the optimizer; `master` 0 where the parameters themselves are fp32,
            `moment` the mean of both.
    """

    compute: int = 2
    fp8: bool = False
    fp8_caches: bool = False
    fp8_dispatch: bool = False
    recipe: str = ""
    fp8_attention: bool = False
    fp8_head: bool = False
    fp8_parameters: bool = False
    main_gradient: int = 4
    master: int = 4
    moment: float = 2

    @property
    def fp4(self) -> bool:
        """Operands of forward and input gradients in NVFP4."""
        return self.recipe == "nvfp4"

    @property
    def name(self) -> str:
        """For tables: "bf16", "mxfp8", …"""
        return (self.recipe or "fp8") if self.fp8 else "bf16" if self.compute == 2 else "fp32"


def refuse_batch(batch: int, micro_batch: int, replicas: int) -> None:
    """PlanError for a global batch that is no whole number of microbatches on each data-parallel rank."""
    if batch % (micro_batch * replicas):
        raise PlanError(
            f"global_batch_size={batch} is not a multiple of micro_batch_size={micro_batch} × {replicas} data-parallel "
            f"ranks: use a multiple of {micro_batch * replicas}"
        )


def megatrons_schedule(pp: int, num_model_chunks: int, overlap: bool) -> str:
    """The table of Megatron's own schedule; one stage has pairs too, a microbatch's forward beside the one before."""
    return INTERLEAVED if num_model_chunks > 1 or (overlap and pp == 1) else "1f1b"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks and pipeline of a job; sizes as Megatron's arguments.

    Attributes:
        num_gpus: of the job.
        pp: pipeline ranks of the job (with DualPipe of both directions together).
        etp: ranks that share each expert, split by width (`--expert-tensor-parallel-size`).
        num_model_chunks: stages per rank of Megatron's interleaved schedule or of a zigzag, else 1.
        microbatch_group_size: of that schedule; None for `pp`.
        zigzag: what its table is dealt by, as further arguments of `build_schedule`; else, and for what is not in it,
            `pipeline.nominal`.
        overlap_pairs: the all-to-all of a pair's forward runs beside the backward's computation, and vice versa.
        wgrad_apart: in a pair weight gradients wait until their input gradient is sent (`--delay-wgrad-compute`).
    """

    num_gpus: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    schedule: str = "1f1b"
    num_model_chunks: int = 1
    microbatch_group_size: int | None = None
    overlap_pairs: bool = True
    wgrad_apart: bool = True
    zigzag: tuple[tuple[str, Any], ...] = ()

    @property
    def dealt_by(self) -> str:
        """What a zigzag's table is dealt by, for tables: " memory_cap 20"."""
        return "".join(f" {name} {value:g}" for name, value in self.zigzag)

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the model."""
        if self.schedule == INTERLEAVED:
            return self.pp * self.num_model_chunks
        return TRAITS[self.schedule].num_stages(self.pp, self.num_model_chunks)

    @property
    def table_options(self) -> dict[str, Any]:
        """Further arguments of `build_schedule`."""
        if self.schedule == INTERLEAVED:
            return {
                "num_model_chunks": self.num_model_chunks,
                "microbatch_group_size": self.microbatch_group_size,
            }
        if self.schedule == ZIGZAG:
            return nominal_options(self.pp, self.num_model_chunks) | dict(self.zigzag)
        return {}

    @property
    def dp(self) -> int:
        """Replicas of the pipeline: ranks that see different data (a rank of DualPipe counts once)."""
        return self.num_gpus // (self.tp * self.cp * self.pp)

    @property
    def copies(self) -> int:
        """Ranks of one pipeline that hold the same stage: 2 under DualPipe."""
        return 1 if self.schedule == INTERLEAVED else TRAITS[self.schedule].directions

    @property
    def dense_shards(self) -> int:
        """Ranks that hold the same dense parameter, and share its optimizer state (ZeRO-1)."""
        return self.dp * self.cp * self.copies

    @property
    def expert_ranks(self) -> int:
        """Ranks over which one layer's experts are spread: neighbours share an expert, if any do."""
        return self.ep * self.etp

    @property
    def expert_shards(self) -> int:
        """Ranks that hold the same expert."""
        return max(1, self.num_gpus // (self.pp * self.expert_ranks)) * self.copies


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a plan depends on, besides the hardware and the parameter counts.

    Attributes:
        sizes: of the model; `sizes.seq_length` is that of a sample.
        stages: what each stage holds, from the embedding to the head.
        global_batch_size, micro_batch_size: in samples.
        recompute: names of `--recompute-modules`; "full" for whole layers.
        recompute_layers: of whole layers, the first so many of each stage (`--recompute-method block`); None for all.
        recompute_together: whole layers of which only the first one's input is kept (`--recompute-method uniform`).
        distributed_optimizer: optimizer states are sharded over the replicas (ZeRO-1).
        transformer_impl: "transformer_engine", or "local", the reference backend in plain PyTorch.
        dispatcher: "flex" (DeepEP, HybridEP) sends a token once to each NVLink domain, which forwards it;
            as DeepSeek's own all-to-all does, which the table is fitted to; "two_hop" likewise, over NCCL; "alltoall"
            sends a copy for each expert.
        flex_backend: "deepep" or "hybridep".
        capacity_factor: tokens of an expert against the mean, the others being dropped and the missing ones padded
            (`--moe-expert-capacity-factor` with `--moe-pad-expert-input-to-capacity`); None: none is dropped.
        moe_router_num_groups, moe_router_group_topk: of the experts; 1 and 1 for routing without groups.
        dispatch_chunks: pieces of "two_hop".
        load_imbalance: tokens of the fullest expert-parallel rank against the mean of all.
        balance_loss: the sequence-wise balance loss is on.
        communication_sms: that dispatch and combine take from a pair's computation while they run; None: those of the
            hardware table, set aside for as long as a pair runs, which is DeepSeek's way (R§3.2.2) and what is fitted.
        shared_expert_overlap: the shared expert computes beside dispatch and combine (`--moe-shared-expert-overlap`).
        whole_iteration_graph: a step is one CUDA graph: nothing waits for launches.
        software: versions, fusions and graphs.
        offload_optimizer: share of the optimizer's states in host memory (`--optimizer-offload-fraction`).
        offload_modules: whose inputs are in host memory (`--offload-modules`).
        hardware: what its GPUs can do that those of the table cannot (`whatif.py`).
        unplanned: what the arguments say and a plan leaves out, in words (`unplanned.py`).
        nvlink_domain: neighbouring GPUs that share NVLink (`--nvlink-domain-size`, or what a machine has of the job);
            None: as the hardware table has it.
    """

    sizes: ModelSizes
    layout: Layout
    stages: tuple[Stage, ...]
    global_batch_size: int
    micro_batch_size: int = 1
    precision: Precision = field(default_factory=Precision)
    recompute: frozenset[str] = frozenset()
    recompute_layers: int | None = None
    recompute_together: int = 1
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    transformer_impl: str = "transformer_engine"
    dispatcher: str = "flex"
    flex_backend: str = "deepep"
    capacity_factor: float | None = None
    moe_router_num_groups: int = 1
    moe_router_group_topk: int = 1
    dispatch_chunks: int = 10
    load_imbalance: float = 1.0
    balance_loss: bool = True
    communication_sms: int | None = None
    shared_expert_overlap: bool = False
    whole_iteration_graph: bool = False
    software: Software = field(default_factory=Software)
    offload_optimizer: float = 0.0
    offload_modules: frozenset[str] = frozenset()
    unplanned: tuple[str, ...] = ()
    nvlink_domain: int | None = None
    hardware: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if len(self.stages) != self.layout.num_stages:
            raise PlanError(
                f"pipeline_model_parallel_layout has {len(self.stages)} stages, but schedule={self.layout.schedule} on "
                f"pipeline_model_parallel_size={self.layout.pp} has {self.layout.num_stages}: give that many"
            )
        refuse_batch(self.global_batch_size, self.micro_batch_size, self.layout.dp)

    @property
    def delays_weight_gradients(self) -> bool:
        """Whether the schedule runs weight gradients apart from the backward pass."""
        name = self.layout.schedule
        return name != INTERLEAVED and TRAITS[name].delays_weight_gradients

    @property
    def num_microbatches(self) -> int:
        """Of one pipeline and step, both directions together."""
        return self.global_batch_size // (self.micro_batch_size * self.layout.dp)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sizes.seq_length

    @cached_property
    def tokens(self) -> int:
        """Tokens of a microbatch on one rank of a context-parallel group."""
        return self.micro_batch_size * self.sizes.seq_length // self.layout.cp

    @cached_property
    def routed_tokens(self) -> float:
        """Token copies that the fullest expert-parallel rank receives for one layer and microbatch.

        A rank sends `topk` copies of its part of the tokens, and receives as many when the load is even; ranks that
        share an expert all receive what is for it.
        """
        factor = self.load_imbalance if self.capacity_factor is None else self.capacity_factor
        return self.tokens / self.layout.tp * self.sizes.moe_router_topk * factor * self.layout.etp

    @property
    def expert_width(self) -> float:
        """Of an expert, on one of the ranks that share it."""
        return self.sizes.moe_ffn_hidden_size / self.layout.etp

    @property
    def local_experts(self) -> int:
        """Experts that one rank holds of a layer."""
        return max(1, self.sizes.num_moe_experts // self.layout.ep)

    def recomputed_layers(self, num_layers: int) -> float:
        """Of the layers of one stage, those that are computed again as a whole."""
        if "full" not in self.recompute:
            return 0
        return num_layers if self.recompute_layers is None else min(num_layers, self.recompute_layers)

    @property
    def experts_pad(self) -> bool:
        """Whether the experts copy their rows into as many as FP8 asks for.

        Megatron's `skip_routed_expert_padding`.
        """
        padded = self.software.router_padding or self.capacity_factor is not None
        hybridep = self.dispatcher == "flex" and self.flex_backend == "hybridep"
        return self.precision.fp8 and not (padded or hybridep or self.software.own_kernels)
