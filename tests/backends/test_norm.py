"""RMSNorm against torch's, in every dtype, and its mark for sequence parallelism."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.backends.norm import RMSNorm


def make(**config) -> RMSNorm:
    fields = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "normalization": "RMSNorm",
        **config,
    }
    return RMSNorm(TransformerConfig(**fields), hidden_size=8, eps=1e-6)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_against_torch_in_fp64(dtype: torch.dtype, tolerance: float) -> None:
    norm = make(params_dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=generator)
    x = torch.randn(3, 2, 8, generator=generator).to(dtype).requires_grad_()
    exact_x, exact_w = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = torch.nn.functional.rms_norm(exact_x, (8,), exact_w, 1e-6)
    grad = torch.randn(3, 2, 8, generator=generator).to(dtype)
    y = norm(x)
    y.backward(grad)
    exact.backward(grad.double())
    assert y.dtype == dtype
    for a, b in ((y, exact), (x.grad, exact_x.grad), (norm.weight.grad, exact_w.grad)):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_squares_are_not_computed_in_bf16() -> None:
    """A mean of 1 + 255·2⁻⁸ squared terms loses its small terms in bf16, not in fp32."""
    x = torch.full((1, 8), 2.0**-5, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    expected = x.double() / (x.double().square().mean() + 1e-6).sqrt()
    torch.testing.assert_close(make(params_dtype=torch.bfloat16)(x).double(), expected, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_mark_for_sequence_parallelism(sequence_parallel: bool) -> None:
    tensor_parallel = 2 if sequence_parallel else 1
    norm = make(
        sequence_parallel=sequence_parallel, tensor_model_parallel_size=tensor_parallel, num_attention_heads=2
    )
    assert norm.weight.sequence_parallel is sequence_parallel


@pytest.mark.parametrize(
    "config, message",
    [
        ({"normalization": "LayerNorm"}, "--normalization RMSNorm"),
        ({"layernorm_zero_centered_gamma": True}, "1p"),
    ],
)
def test_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**config)
