"""Parameters of each kind of layer, and what a stage of them weighs; counted from real modules in `counting.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv3_megatron.metrics.flops import ModelSizes
from dsv3_megatron.plan.job import Job, Stage

EXPERTS = "routed_experts"
LINEAR = (
    "attention",
    "dense_mlp",
    "shared_experts",
    EXPERTS,
    "mtp_projection",
)  # on FP8 operands, report §3.3.1


@dataclass(frozen=True)
class ParameterCounts:
    """Elements by module kind (names of `dryrun.count`), as one tensor-parallel rank holds them.

    Routed experts are given over all expert-parallel ranks.

    Attributes:
        dense, moe, mtp: of one layer of each kind; `mtp` with its norms and projection.
        embedding, head: of the first and the last stage; `head` with the final norm.
        tp: tensor-parallel size that was counted.
        padded_vocab_size: rows of the embedding over all tensor-parallel ranks.
    """

    dense: Mapping[str, int]
    moe: Mapping[str, int]
    mtp: Mapping[str, int]
    embedding: Mapping[str, int]
    head: Mapping[str, int]
    tp: int = 1
    padded_vocab_size: int = 0

    def of_stage(self, stage: Stage, expert_ranks: int, *, embedding_for_mtp: bool) -> "Held":
        """What a rank holds of one stage.

        expert_ranks: over which a layer's experts are spread.
        embedding_for_mtp: the stage has an embedding of its own for MTP; not where one rank holds both ends.
        """
        parts: dict[str, float] = {}
        own_embedding = stage.embedding or (stage.mtp > 0 and embedding_for_mtp)
        for number, kinds in (
            (stage.dense, self.dense),
            (stage.moe, self.moe),
            (stage.mtp, self.mtp),
            (own_embedding, self.embedding),
            (stage.head, self.head),
        ):
            for kind, size in kinds.items():
                if number:
                    parts[kind] = parts.get(kind, 0) + number * size / (
                        expert_ranks if kind == EXPERTS else 1
                    )
        return Held(parts)

    def total(self, num_dense: int, num_moe: int, num_mtp: int) -> int:
        """Elements of the whole model; only for tp = 1."""
        layers = ((num_dense, self.dense), (num_moe, self.moe), (num_mtp, self.mtp))
        ends = sum(self.embedding.values()) + sum(self.head.values())
        return sum(number * sum(kinds.values()) for number, kinds in layers) + ends


@dataclass(frozen=True)
class Held:
    """Elements by module kind on one rank."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def experts(self) -> float:
        return self.parts.get(EXPERTS, 0)

    @property
    def rest(self) -> float:
        """All that is no routed expert."""
        return sum(self.parts.values()) - self.experts

    @property
    def linear(self) -> float:
        """Weights of linear layers that run in FP8."""
        return sum(self.parts.get(kind, 0) for kind in LINEAR)


def held_by(job: Job, counts: ParameterCounts, stages: tuple[int, ...]) -> Held:
    """What a rank holds that has these stages; an embedding it has twice is one (report §3.2.3)."""
    both_ends = any(job.stages[index].embedding for index in stages)
    parts: dict[str, float] = {}
    for index in stages:
        of_stage = counts.of_stage(
            job.stages[index], job.layout.expert_ranks, embedding_for_mtp=not both_ends
        )
        for kind, size in of_stage.parts.items():
            parts[kind] = parts.get(kind, 0) + size
    return Held(parts)


def counts_of_sizes(s: ModelSizes, tp: int = 1) -> ParameterCounts:
    """What `counting.count_parameters` finds by building modules, from the sizes alone (a test compares them)."""
    h, heads = s.hidden_size, s.num_attention_heads // tp
    q_rows = heads * (s.qk_head_dim + s.qk_pos_emb_head_dim)
    query = h * s.q_lora_rank + s.q_lora_rank * q_rows if s.q_lora_rank else h * q_rows
    attention = query + h * (s.kv_lora_rank + s.qk_pos_emb_head_dim)
    attention += s.kv_lora_rank * heads * (s.qk_head_dim + s.v_head_dim) + heads * s.v_head_dim * h
    layer = {"attention": attention, "norm": 2 * h + (s.q_lora_rank or 0) + s.kv_lora_rank}
    dense = layer | {"dense_mlp": 3 * h * s.ffn_hidden_size // tp}
    moe = layer | {
        "router": s.num_moe_experts * h,
        EXPERTS: s.num_moe_experts * 3 * h * s.moe_ffn_hidden_size,
        "shared_experts": 3 * h * s.moe_shared_expert_intermediate_size // tp,
    }
    mtp = moe | {"norm": layer["norm"] + 3 * h, "mtp_projection": 2 * h * h // tp}
    vocabulary = s.padded_vocab_size * h // tp
    return ParameterCounts(
        dense=dense,
        moe=moe if s.num_moe_layers else {},
        mtp=mtp if s.mtp_num_layers else {},
        embedding={"embedding": vocabulary},
        head={"output_head": vocabulary, "norm": h},
        tp=tp,
        padded_vocab_size=s.padded_vocab_size,
    )
