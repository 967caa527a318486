"""What cannot be combined with `--overlap-moe-expert-parallel-comm`, Megatron's merged passes."""

from argparse import Namespace

from dsv3_megatron.arguments.refusals.layout import _interleaved
from dsv3_megatron.arguments.refusals.table import Refusal

FEATURE = "Overlapped expert-parallel communication"
ON = "--bf16 --expert-model-parallel-size 2 --overlap-moe-expert-parallel-comm"
ARGUMENT = "--overlap-moe-expert-parallel-comm"


def _on(a: Namespace) -> bool:
    return bool(a.overlap_moe_expert_parallel_comm)


ROWS = (
    Refusal(
        "overlap_full_recompute",
        FEATURE,
        "--recompute-granularity",
        "{recompute_granularity}",
        lambda a, s: (
            _on(a)
            and (a.recompute_granularity == "full" or a.recompute_method is not None or a.moe_layer_recompute)
        ),
        f"whole layers cannot be recomputed with {ARGUMENT}",
        "--recompute-granularity selective --recompute-modules layernorm mla_up_proj moe_act",
        ON + " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    Refusal(
        "overlap_moe_recompute",
        FEATURE,
        "--recompute-modules",
        "{recompute_modules}",
        lambda a, s: _on(a) and "moe" in (a.recompute_modules or []),
        f"the MoE layer cannot be recomputed as a whole with {ARGUMENT}",
        "moe_act and layernorm instead of moe",
        ON + " --recompute-granularity selective --recompute-modules moe",
    ),
    Refusal(
        "overlap_without_ep",
        FEATURE,
        ARGUMENT,
        "with --expert-model-parallel-size {expert_model_parallel_size}",
        lambda a, s: _on(a) and a.expert_model_parallel_size == 1,
        "there is no communication to overlap",
        "--expert-model-parallel-size 2 or more, or leave it out",
        "--bf16 --overlap-moe-expert-parallel-comm",
    ),
    Refusal(
        "overlap_without_bf16",
        FEATURE,
        ARGUMENT,
        "without --bf16",
        lambda a, s: _on(a) and not (a.bf16 or a.fp16),
        "Megatron overlaps only half precision",
        "--bf16 as well",
        "--expert-model-parallel-size 2 --overlap-moe-expert-parallel-comm",
    ),
    Refusal(
        "overlap_without_chunks",
        FEATURE,
        ARGUMENT,
        "with --pipeline-model-parallel-size {pipeline_model_parallel_size}",
        lambda a, s: _on(a) and a.pipeline_model_parallel_size > 1 and not _interleaved(a),
        "a pipeline overlaps one chunk's forward with another's backward",
        "--num-virtual-stages-per-pipeline-rank 2 as well",
        ON + " --pipeline-model-parallel-size 2",
    ),
    Refusal(
        "overlap_mtp_depth",
        FEATURE,
        "--mtp-num-layers",
        "{mtp_num_layers}",
        lambda a, s: _on(a) and (a.mtp_num_layers or 0) > 1,
        f"{ARGUMENT} is written for one MTP layer",
        "--mtp-num-layers 1",
        ON + " --mtp-num-layers 2",
    ),
    Refusal(
        "overlap_packed_mtp",
        FEATURE,
        ARGUMENT,
        "with packed sequences (--sft or --dataloader-inter-document-masking)",
        lambda a, s: _on(a) and bool(a.mtp_num_layers) and (a.sft or a.dataloader_inter_document_masking),
        "the overlapped MTP layer takes no document boundaries",
        "--mtp-num-layers 0, or no overlap",
        ON + " --dataloader-inter-document-masking",
    ),
    Refusal(
        "overlap_shared_expert",
        FEATURE,
        "--moe-shared-expert-overlap",
        "",
        lambda a, s: _on(a) and a.moe_shared_expert_overlap,
        f"{ARGUMENT} runs the shared expert itself",
        "only one of the two",
        ON + " --moe-shared-expert-overlap",
    ),
    Refusal(
        "delayed_wgrad_alone",
        FEATURE,
        "--delay-wgrad-compute",
        "",
        lambda a, s: a.delay_wgrad_compute and not _on(a),
        f"weight gradients are delayed to overlap them, which needs {ARGUMENT}",
        f"{ARGUMENT} as well",
        "--delay-wgrad-compute --transformer-impl transformer_engine",
    ),
)
