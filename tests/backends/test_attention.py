"""The reference backend's core attention against the formula, packed, and under context parallelism."""

from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dsv3_megatron.backends.attention import SDPACoreAttention, causal_blocks, zigzag_order
from tests.harness import run_distributed

HEADS, D_QK, D_V, SCALE = 3, 10, 6, 0.37


def make(**config: Any) -> SDPACoreAttention:
    options = {"pg_collection": config.pop("pg_collection", None)}
    fields = {
        "num_layers": 1,
        "hidden_size": 12,
        "num_attention_heads": HEADS,
        "attention_dropout": 0.0,
        **config,
    }
    return SDPACoreAttention(
        TransformerConfig(**fields), 1, AttnMaskType.causal, softmax_scale=SCALE, **options
    )


def random_qkv(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = (D_QK, D_QK, D_V)
    return [
        torch.randn(*shape, HEADS, size, generator=generator).to(dtype).requires_grad_() for size in sizes
    ]


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention by the formula: [s, b, n, d] → [s, b, n·d_v]."""
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * SCALE
    length = query.shape[0]
    scores = scores.masked_fill(torch.arange(length)[None, :] > torch.arange(length)[:, None], float("-inf"))
    return torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), value).flatten(2)


def output_and_grads(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), inputs)]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_against_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    inputs = random_qkv(16, 2, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = output_and_grads(make()(*inputs), inputs)
    for a, b in zip(got, output_and_grads(written_out(*exact), exact), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_backward_is_deterministic() -> None:
    inputs = random_qkv(64, 2)
    first = output_and_grads(make()(*inputs), inputs)
    for _ in range(3):
        for a, b in zip(first, output_and_grads(make()(*inputs), inputs), strict=True):
            assert torch.equal(a, b)


LENGTHS = [5, 1, 10]


def packed(cu_seqlens: list[int], padded: list[int] | None = None) -> PackedSeqParams:
    as_tensor = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in (cu_seqlens, padded)]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=as_tensor[0],
        cu_seqlens_kv=as_tensor[0],
        cu_seqlens_q_padded=as_tensor[1],
        cu_seqlens_kv_padded=as_tensor[1],
    )


def test_packed_equals_separate_sequences() -> None:
    inputs = random_qkv(16)
    got = output_and_grads(make()(*inputs, packed_seq_params=packed([0, 5, 6, 16])), inputs)
    separate = [
        written_out(*(x.unsqueeze(1) for x in part))
        for part in zip(*(x.split(LENGTHS) for x in inputs), strict=True)
    ]
    for a, b in zip(got, output_and_grads(torch.cat(separate).squeeze(1), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_between_sequences_changes_nothing() -> None:
    """Sequences of 5 and 6 tokens padded to 8 each, and 2 tokens beyond: real tokens do not see them."""
    inputs = random_qkv(18)
    output = make()(*inputs, packed_seq_params=packed([0, 5, 11], [0, 8, 16]))
    for start, length in ((0, 5), (8, 6)):
        alone = written_out(*(x[start : start + length].unsqueeze(1) for x in inputs)).squeeze(1)
        torch.testing.assert_close(output[start : start + length], alone)
    assert output.shape == (18, HEADS * D_V)


def test_too_long_cu_seqlens_is_an_error() -> None:
    with pytest.raises(ValueError, match="ends at 20, but there are only 16 tokens"):
        make()(*random_qkv(16), packed_seq_params=packed([0, 20]))


@pytest.mark.parametrize(
    "config, message",
    [({"attention_dropout": 0.1}, "--attention-dropout 0.1"), ({"window_size": (8, 0)}, "--window-size")],
)
def test_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_mask_that_is_not_causal_is_refused() -> None:
    with pytest.raises(ValueError, match="only causal"):
        make()(*random_qkv(4, 1), attn_mask_type=AttnMaskType.no_mask)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("cu_seqlens", [[0, 16], [0, 8, 8, 32, 40]])
def test_blocks_cover_the_causal_mask_once(cp_size: int, cu_seqlens: list[int]) -> None:
    tokens = cu_seqlens[-1]
    order = zigzag_order(cu_seqlens, cp_size)  # natural position → position in the ranks' concatenation
    assert sorted(order.tolist()) == list(range(tokens))
    natural = order.argsort()
    covered = torch.zeros(tokens, tokens)
    for rank in range(cp_size):
        mine = natural[rank * tokens // cp_size :]
        for block in causal_blocks(cu_seqlens, cp_size, rank):
            for i, query in enumerate(mine[block.q_start : block.q_end].tolist()):
                last = block.k_end - (block.q_end - block.q_start) + i
                assert last == query
                covered[query, block.k_start : last + 1] += 1
    sequence = torch.bucketize(torch.arange(tokens), torch.tensor(cu_seqlens[1:]), right=True)
    expected = torch.ones(tokens, tokens).tril() * (sequence[:, None] == sequence[None, :])
    assert torch.equal(covered, expected)


def test_sequence_that_cannot_be_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match="pad sequences to a multiple of 4"):
        causal_blocks([0, 10], cp_size=2)


def context_parallel(rank: int, world_size: int, cu_seqlens: list[int] | None) -> list[Tensor]:
    """Output and gradients of the whole batch, computed by `world_size` context-parallel ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    module = make(context_parallel_size=world_size, pg_collection=groups)
    inputs = random_qkv(16) if cu_seqlens else random_qkv(16, 2)
    natural = zigzag_order(cu_seqlens or [0, 16], world_size).argsort()
    mine = natural.chunk(world_size)[rank]
    local = [x.detach()[mine].requires_grad_() for x in inputs]
    output = module(*local, packed_seq_params=packed(cu_seqlens) if cu_seqlens else None)
    weight = torch.linspace(-1, 1, output.numel() * world_size).view(16, *output.shape[1:])[mine]
    results = []
    for part in (output.detach(), *torch.autograd.grad((output * weight).sum(), local)):
        parts = [torch.empty_like(part) for _ in range(world_size)]
        dist.all_gather(parts, part.contiguous())
        results.append(torch.cat(parts)[natural.argsort()])
    return results


@pytest.mark.parametrize("cu_seqlens", [None, [0, 4, 16]])
def test_context_parallel_equals_one_rank(cu_seqlens: list[int] | None) -> None:
    inputs = random_qkv(16) if cu_seqlens else random_qkv(16, 2)
    one = output_and_grads(
        make()(*inputs, packed_seq_params=packed(cu_seqlens) if cu_seqlens else None), inputs
    )
    for got in run_distributed(context_parallel, world_size=2, cu_seqlens=cu_seqlens):
        for a, b in zip(got, one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
