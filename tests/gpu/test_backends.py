"""Reference backend against Transformer Engine on one GPU: outputs and every gradient.

Both start from the same weights (initial values depend on the global name only). The yardstick is the
reference
backend in fp32: TE's bf16 result may be at most a few times as far from it as the reference backend's own
bf16 result, so the test needs no tolerance guessed per layer.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu.device import needs_te, te_impl

pytestmark = pytest.mark.gpu

# Head sizes of DeepSeek-V3; the rest small, in multiples of 128.
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "moe_layer_freq": [0, 1, 1],
    "mtp_num_layers": 1,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "moe_ffn_hidden_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
# In a rehearsal the reference backend stands in for TE.
TE = {"transformer_impl": te_impl(), "moe_grouped_gemm": te_impl() == "transformer_engine"}
FACTOR = 3.0  # TE's error over the reference backend's, both against fp32


@pytest.fixture
def one_gpu() -> Iterator[None]:
    """Megatron's groups on one rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def outputs_and_gradients(overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loss per token and the gradient of every weight by global name, in float64."""
    from dsv3_megatron.specs.names import global_names
    from tests.specs.models import build, micro_config, random_batch

    model = build(micro_config(**SIZES, **overrides)).cuda()
    if "params_dtype" in overrides:
        model = model.bfloat16()
    batch = {name: tensor.cuda() for name, tensor in random_batch(batch=2, seq=128).items()}
    losses = model(attention_mask=None, **batch)
    losses.mean().backward()
    names = global_names(model)
    found = {"losses": losses.detach().double()}
    for local, parameter in model.named_parameters():
        assert parameter.grad is not None, local
        found[names[local].name] = parameter.grad.double()
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def test_outputs_and_gradients(one_gpu: None, record_property: Callable[[str, object], None]) -> None:
    needs_te()
    exact = outputs_and_gradients({})
    reference = outputs_and_gradients(BF16)
    te = outputs_and_gradients(BF16 | TE)
    assert exact.keys() == reference.keys() == te.keys()
    errors = {
        name: (distance(te[name], exact[name]), distance(reference[name], exact[name])) for name in exact
    }
    worst = max(errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-12))
    record_property("num_gradients", len(exact) - 1)
    record_property("loss_error_te", f"{errors['losses'][0]:.2e}")
    record_property("loss_error_reference_bf16", f"{errors['losses'][1]:.2e}")
    record_property("worst", f"{worst}: TE {errors[worst][0]:.2e}, reference {errors[worst][1]:.2e}")
    floor = 2.0**-9  # half a bf16 ulp: below it both are as good as bf16 can tell
    far = {name: pair for name, pair in errors.items() if pair[0] > FACTOR * max(pair[1], floor)}
    assert not far, f"TE is more than {FACTOR}x as far from fp32 as the reference backend: {far}"
