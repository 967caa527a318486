"""DeepSeek-V3's own training as the planner sees it: the model, the layout, and what was published of its times.

Sources: report §3.2, §4.2 (arXiv 2412.19437); Table 4 of arXiv 2505.09343; `train.json` of deepseek-ai/profile-data.
"""

from dsv3_megatron.metrics.flops import ModelSizes
from dsv3_megatron.plan.job import Job, Layout, Precision, Software, Stage
from dsv3_megatron.plan.parameters import ParameterCounts

SIZES = ModelSizes(
    num_layers=61,
    num_moe_layers=58,
    hidden_size=7168,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
    ffn_hidden_size=18432,
    moe_ffn_hidden_size=2048,
    moe_shared_expert_intermediate_size=2048,
    moe_router_topk=8,
    num_moe_experts=256,
    padded_vocab_size=129280,
    seq_length=4096,
    mtp_num_layers=1,
)
# Equal to what is counted from the real modules (tests/plan/test_counting.py); here so that pure code has them.
_ATTENTION, _EXPERT, _VOCABULARY = 187_105_280, 44_040_192, 129_280 * 7168
_LAYER = {"attention": _ATTENTION, "norm": 16_384}
_MOE = _LAYER | {"router": 256 * 7168, "routed_experts": 256 * _EXPERT, "shared_experts": _EXPERT}
COUNTS = ParameterCounts(
    dense=_LAYER | {"dense_mlp": 3 * 7168 * 18432},
    moe=_MOE,
    mtp=_MOE | {"norm": 16_384 + 3 * 7168, "mtp_projection": 2 * 7168**2},
    embedding={"embedding": _VOCABULARY},
    head={"output_head": _VOCABULARY, "norm": 7168},
    padded_vocab_size=129_280,
)
STAGES = (Stage(dense=3, moe=1, embedding=True), *[Stage(moe=4)] * 14, Stage(moe=1, mtp=1, head=True))
# R§3.2.3: norms and MLA up projections are computed again; R§3.3.3: SwiGLU's output too.
RECOMPUTE = frozenset({"layernorm", "mla_up_proj", "moe_act"})
JOB = Job(
    sizes=SIZES,
    layout=Layout(num_gpus=2048, pp=16, ep=64, schedule="dualpipe"),
    stages=STAGES,  # how many layers a stage has is unpublished: ours, as in conf/layout/pp16_ep64.yaml
    global_batch_size=15360,
    precision=Precision(fp8=True, fp8_caches=True, fp8_dispatch=True, recipe="dsv3"),
    recompute=RECOMPUTE,
    moe_router_num_groups=8,
    moe_router_group_topk=4,
    software=Software(own_kernels=True),
)

# Milliseconds per MoE layer in the trace, and of a pair of 4 MoE layers: EP64, one sequence of 4096 tokens, balanced
# routing, no pipeline messages, computation on 112 of 132 SMs.
TRACE_COMPUTE = {
    "attention_f": 4.4,
    "attention_b": 9.6,
    "attention_w": 2.4,
    "mlp_f": 4.4,
    "mlp_b": 5.5,
    "mlp_w": 5.1,
}
TRACE_COMMUNICATION = {"dispatch": 5.6, "combine": 8.3, "dispatch_b": 7.9, "combine_b": 5.2}
TRACE_PAIR_OF_4_LAYERS = 129.0

STEP_S, TOKENS_PER_S_PER_GPU = 19.926, 1542.0
GPU_HOURS_PER_1T, DAYS_PER_1T = 180e3, 3.7
BUBBLE_S = 2.06
OPTIMIZER_S = 0.29
# Table 4 read as rank 0 of DualPipe's program: milliseconds.
UNIT_TIMES = {"F": 49.0, "I": 75.0, "W": 32.0, "F&B": 144.0}
"""Totals of the report, in GPU-hours: pre-training, long context, post-training."""
PRETRAINING_HOURS, LONG_CONTEXT_HOURS, POST_TRAINING_HOURS = 2664e3, 119e3, 5e3
PRETRAINING_TOKENS = 14.8e12
DOLLARS_PER_GPU_HOUR = 2.0  # the report's assumption
