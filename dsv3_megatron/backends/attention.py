"""Core attention in plain PyTorch: causal, packed sequences, context parallelism, head sizes of MLA."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["AttentionBlock", "SDPACoreAttention", "causal_blocks", "zigzag_order"]

CAUSAL_MASKS = (AttnMaskType.causal, AttnMaskType.padding_causal)


@dataclass(frozen=True)
class AttentionBlock:
    """Queries [q_start, q_end) of this rank attend causally to keys [k_start, k_end) of the whole batch.

    The last query and the last key are the same token.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int


def causal_blocks(cu_seqlens: list[int], cp_size: int = 1, cp_rank: int = 0) -> list[AttentionBlock]:
    """Split causal attention over packed sequences into dense blocks.

    Args:
        cu_seqlens: [0, end of sequence 0, end of sequence 1, …] over all context-parallel ranks, in tokens.
        cp_size, cp_rank: with context parallelism each sequence is cut into 2·cp_size chunks, of which rank r
            holds chunk r and chunk 2·cp_size−1−r (zigzag, which balances the causal work).

    Raises:
        ValueError: a sequence cannot be cut into 2·cp_size equal chunks.
    """
    blocks: list[AttentionBlock] = []
    local = 0
    for start, end in itertools.pairwise(cu_seqlens):
        if start == end:
            continue
        if cp_size == 1:
            blocks.append(AttentionBlock(start, end, start, end))
            continue
        chunk, rest = divmod(end - start, 2 * cp_size)
        if rest:
            raise ValueError(
                f"--context-parallel-size {cp_size}: a sequence of {end - start} tokens cannot be cut into "
                f"{2 * cp_size} equal chunks; pad sequences to a multiple of {2 * cp_size}"
            )
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            blocks.append(AttentionBlock(local, local + chunk, start, start + (index + 1) * chunk))
            local += chunk
    return blocks


def zigzag_order(cu_seqlens: list[int], cp_size: int) -> Tensor:
    """Where each token of the batch stands after concatenating the ranks' tokens: int64 [tokens]."""
    position = torch.empty(cu_seqlens[-1], dtype=torch.int64)
    offset = 0
    for rank in range(cp_size):
        for block in causal_blocks(cu_seqlens, cp_size, rank):
            length = block.q_end - block.q_start
            position[block.k_end - length : block.k_end] = torch.arange(offset, offset + length)
            offset += length
    return position


class SDPACoreAttention(torch.nn.Module):
    """softmax(q·kᵀ · scale + causal mask)·v with torch's scaled_dot_product_attention.

    Interface of Megatron's core attention modules. Query and key heads may be wider than value heads (192 and
    128 in DeepSeek-V3). The softmax scale is the caller's: MLA passes mscale²/√(qk head dim).

    The mask is causal within each sequence, from cu_seqlens where sequences are packed; the attention_mask
    argument is not read, as with Transformer Engine's causal attention. With context parallelism the keys and
    values of the whole sequence are gathered (their gradients reduce-scattered), and each rank's queries
    attend to those before them.

    Raises:
        ValueError: attention dropout, a sliding window, or a mask type that is not causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ):
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"--attention-dropout {dropout}: the reference backend has none; use 0")
        if config.window_size is not None:
            raise ValueError(
                f"--window-size {config.window_size}: DeepSeek-V3's attention is full; leave it out"
            )
        if attn_mask_type not in CAUSAL_MASKS:
            raise ValueError(f"attention mask type {attn_mask_type}: only causal attention is supported")
        self.softmax_scale = softmax_scale
        self.cp_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """Causal attention.

        Args:
            query, key: [s, b, n, d_qk], or [t, n, d_qk] with packed sequences; s and t count this rank's
                tokens.
            value: [s, b, n, d_v] or [t, n, d_v].
            packed_seq_params: cu_seqlens of packed sequences (the padded ones, if there are, since padding
                follows its sequence and is masked in the loss).

        Returns:
            [s, b, n·d_v] or [t, n·d_v], in the inputs' dtype.
        """
        if attn_mask_type is not None and attn_mask_type not in CAUSAL_MASKS:
            raise ValueError(f"attention mask type {attn_mask_type}: only causal attention is supported")
        packed = query.dim() == 3
        if packed:
            assert packed_seq_params is not None
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        cp_size = 1 if self.cp_group is None else self.cp_group.size()
        cp_rank = 0 if self.cp_group is None else self.cp_group.rank()
        cu_seqlens = _cu_seqlens(packed_seq_params if packed else None, query.size(0) * cp_size)
        if cp_size > 1:
            order = zigzag_order(cu_seqlens, cp_size).to(key.device)
            key, value = (_gather(x, self.cp_group).index_select(0, order) for x in (key, value))
        outputs = [
            _attend(
                query[block.q_start : block.q_end],
                key[block.k_start : block.k_end],
                value[block.k_start : block.k_end],
                self.softmax_scale,
            )
            for block in causal_blocks(cu_seqlens, cp_size, cp_rank)
        ]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output.squeeze(1) if packed else output


def _cu_seqlens(packed: PackedSeqParams | None, num_tokens: int) -> list[int]:
    """Sequence boundaries over all CP ranks; tokens after the last one count as another sequence."""
    if packed is None:
        return [0, num_tokens]
    cu_seqlens = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    ends = cu_seqlens.tolist()
    if ends[-1] > num_tokens:
        raise ValueError(f"cu_seqlens ends at {ends[-1]}, but there are only {num_tokens} tokens")
    return ends if ends[-1] == num_tokens else [*ends, num_tokens]


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the ranks' tokens [s, b, n, d] → [s·CP, b, n, d]; backward reduce-scatters."""
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of one block, queries aligned to the last keys: [q, b, n, d] → [q, b, n·d_v]."""
    q_len, k_len = query.size(0), key.size(0)
    mask = None
    if q_len != k_len:
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril(k_len - q_len)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(2)
