"""One microbatch for one model chunk."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_hybrid_data_context_parallel_groups
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args

# As a position: the token is padding (rotary embeddings count by themselves, and nothing else looks).
PADDING = -1

KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)


def is_packed(args: Any) -> bool:
    """Whether samples carry document boundaries: fine-tuning data, or documents masked from each other."""
    return bool(args.sft or args.dataloader_inter_document_masking)


def reads_tokens(model: Any) -> bool:
    """Whether this chunk embeds tokens, computes a loss, or predicts further tokens.

    Asked of the chunk itself, not of its pipeline rank: a rank may hold the first and the last stage.
    """
    return any(get_attr_wrapped_model(model, name) for name in ("pre_process", "post_process", "mtp_process"))


def get_batch(data_iterator: Iterator[dict[str, Any]] | None, model: Any) -> dict[str, Any]:
    """The next microbatch, broadcast over tensor-parallel ranks and cut for this context-parallel rank.

    Returns:
        A dict with `KEYS` and `padding_mask`. `tokens`, `labels`, `position_ids` are int64 [b, s / CP], `loss_mask` is
        fp32 of that shape ([1, b·s / CP] for packed samples), `cu_seqlens` int32 [1, n + 1]. `padding_mask` is bool
        like `tokens`, True for padding, which experts' loads do not count; only fine-tuning has any. In post-training
        `sequence`, int64 like `tokens`, says which answer a position's label is of (−1: of none). Entries that a chunk
        has no use for, or all of them on a middle stage, are None.
    """
    args = get_args()
    packed = is_packed(args)
    needed = reads_tokens(model)
    if not needed and not packed:
        return dict.fromkeys((*KEYS, "padding_mask"))

    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    sequence = None
    if tp_rank == 0:
        assert data_iterator is not None, "no dataset was built on a rank whose stage reads tokens"
        sample = next(data_iterator)
        batch = {key: _to_device(sample.get(key)) for key in KEYS}
        sequence = _to_device(sample.get("sequence"))
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        # "MTP here" makes Megatron broadcast every field, which is right for any stage that reads tokens, if only to
        # tell padding.
        mtp_on_this_rank=needed or args.sft,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
    )
    batch = flatten_batch_for_packed_sequences(batch)
    batch["padding_mask"] = batch["position_ids"] == PADDING if args.sft else None
    if getattr(args, "posttrain", None) is not None:
        batch["sequence"] = _on_this_tp_rank(sequence, args)
    if not needed:
        kept = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "padding_mask", "sequence")
        return {key: batch.get(key) if key in kept else None for key in (*KEYS, "padding_mask", "sequence")}
    if getattr(args, "posttrain", None) is not None:
        return batch  # without context parallelism
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=mpu.get_context_parallel_group(),
        hybrid_cp_group_func=get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def packed_seq_params(batch: dict[str, Any]) -> PackedSeqParams | None:
    """Document boundaries for attention, None when the batch has none."""
    if batch["cu_seqlens"] is None:
        return None
    padded = batch["cu_seqlens_padded"]
    padded = None if padded is None else padded.squeeze(0)
    # Attention gets the padded boundaries where there are any, as Megatron's own entry point does.
    boundaries = batch["cu_seqlens"].squeeze(0) if padded is None else padded
    longest = int(batch["max_seqlen"].item())
    local_cp_size = batch["local_cp_size"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=None if local_cp_size is None else int(local_cp_size.item()),
        cp_group=batch["hybrid_cp_group"],
        tokens_per_sample=get_args().seq_length,
    )


def _on_this_tp_rank(sequence: torch.Tensor | None, args: Any) -> torch.Tensor:
    """`sequence` of the group's first rank on all of them, flat as the tokens of packed samples are: [1, b·s]."""
    if sequence is None:
        shape = (args.micro_batch_size, args.seq_length)
        sequence = torch.empty(shape, dtype=torch.int64, device=torch.cuda.current_device())
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            sequence, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group()
        )
    return sequence.reshape(1, -1)


def _to_device(value: Any) -> Any:
    return value.cuda(non_blocking=True) if isinstance(value, torch.Tensor) else value
