"""What Megatron has broken or left out: mended on every device, and broken without the patch."""

import importlib
import subprocess
import sys
from unittest import mock

import pytest
import torch

from dsv3_megatron import patching
from dsv3_megatron.backends import wgrad
from dsv3_megatron.patching import repairs


def test_helpers_are_not_compiled_again() -> None:
    utils = importlib.import_module("megatron.core.datasets.utils")
    assert utils.compile_helpers() is None
    # The control: Megatron's own runs make in a wheel without Makefile, and exits.
    with pytest.raises(SystemExit):
        utils.compile_helpers.__wrapped__()


GPU_PROCESS = """
import sys, types
import torch
# A process that sees a GPU and has no CPU runtime, as far as a machine without one can be.
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
from dsv3_megatron import cpu, train
import megatron.training

class Built(BaseException):  # not for the trainer to explain
    pass

def parse_and_validate_args(**_):
    raise Built

import megatron.training.arguments
megatron.training.arguments.parse_and_validate_args = parse_and_validate_args
try:
    train._train(0.0, {})
except Built:
    pass
assert not cpu.is_active()
assert "dsv3_megatron.cpu.replacements" not in sys.modules
from dsv3_megatron import patching
print([row.name for row in patching.status() if row.state == "installed"])
from dsv3_megatron.backends import wgrad
print(wgrad.implementation())
"""


def test_a_gpu_process_is_repaired_before_it_parses_its_arguments() -> None:
    done = subprocess.run([sys.executable, "-c", GPU_PROCESS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, installed, implementation = done.stdout.splitlines()
    assert set(repairs.REPAIRS) <= set(eval(installed))
    assert implementation == "torch"


def test_help_texts_are_read_once() -> None:
    utils = importlib.import_module("megatron.training.argument_utils")
    config = importlib.import_module("megatron.training.config").ProfilingConfig
    with mock.patch.object(utils.inspect, "getsource", wraps=utils.inspect.getsource) as read:
        first, second = (utils.ArgumentGroupFactory(config).field_docstrings for _ in range(2))
        assert first == second and first is not second and any(first.values())
        assert read.call_count <= 1  # none where a test before has read them
        # The control: Megatron's own reads them again, and finds the same.
        assert (
            patching.unpatched(utils.ArgumentGroupFactory._get_field_docstrings)(mock.Mock(), config) == first
        )
        assert read.call_count >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_added_in_fp32(dtype: torch.dtype) -> None:
    """Against float64 autograd: many microbatches into one main_grad; bf16 accumulation must miss the bound."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(48, 32, dtype=torch.float64))
    main, rounded = torch.zeros(48, 32), torch.zeros(48, 32)
    for _ in range(16):
        x, g = (torch.randn(4, 24, size).to(dtype) for size in (32, 48))
        torch.nn.functional.linear(x.double(), weight).backward(g.double())
        wgrad.wgrad_gemm_accum_fp32(x, g, main)
        rounded += g.reshape(-1, 48).t().matmul(x.reshape(-1, 32)).bfloat16().float()
    exact = weight.grad
    assert exact is not None

    def distance(a: torch.Tensor) -> float:
        return float((a.double() - exact).norm() / exact.norm())

    assert distance(main) < 2e-7
    assert distance(rounded) > 1e-3


def test_half_precision_main_grad() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(64, 8), torch.randn(64, 4)
    main = torch.zeros(4, 8, dtype=torch.bfloat16)
    wgrad.wgrad_gemm_accum_fp16(x.bfloat16(), g.bfloat16(), main)
    assert (main.float() - g.t() @ x).norm() < 0.02 * (g.t() @ x).norm()


def _column_linear(fusion: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        gradient_accumulation_fusion=fusion,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    layer = ColumnParallelLinear(16, 24, config=config, init_method=torch.nn.init.normal_, bias=False)
    layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)
    layer.weight.grad_added_to_main_grad = False
    return layer, layer.weight.main_grad


def test_megatrons_own_linear_adds_to_main_grad(single_rank: None) -> None:
    layer, main = _column_linear(True)
    exact = torch.zeros(24, 16, dtype=torch.float64)
    for _ in range(4):
        x = torch.randn(6, 2, 16).bfloat16()
        y, _ = layer(x)
        g = torch.randn_like(y)
        y.backward(g)
        exact += torch.einsum("...o,...i->oi", g.double(), x.double())
    assert layer.weight.grad_added_to_main_grad
    assert (main.double() - exact).norm() < 1e-6 * exact.norm()


def test_without_the_patch_no_model_is_built(single_rank: None) -> None:
    from megatron.core.tensor_parallel import layers

    patching.unload("fused_wgrad")
    layers._grad_accum_fusion_available = False
    try:
        with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
            _column_linear(True)
    finally:
        patching.install(["fused_wgrad"])
    _column_linear(True)


def test_torch_norm_under_sequence_parallelism() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization="RMSNorm")
    config.sequence_parallel = True
    norm = WrappedTorchNorm(config, 8, 1e-6)
    assert norm.weight.sequence_parallel and config.sequence_parallel
    patching.unload("torch_norm")
    try:
        with pytest.raises(AssertionError, match="sequence parallel not supported"):
            WrappedTorchNorm(config, 8, 1e-6)
    finally:
        patching.install(["torch_norm"])


def test_a_background_save_copies_what_is_on_the_cpu_and_only_that() -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    class Elsewhere(torch.Tensor):
        """A tensor whose `.to("cpu")` is a copy, as a GPU's is."""

        def to(self, *args: object, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
            return copied

    here, copied = torch.ones(3), torch.ones(3)
    there = torch.ones(3).as_subclass(Elsewhere)
    buckets: list = [("file", "key", ([], [(object(), here), (object(), there)]))]
    [(_, _, (_, [(_, first), (_, second)]))] = FileSystemWriterAsync.preload_tensors(buckets, False)
    here.add_(1)
    assert torch.equal(first, torch.ones(3))
    assert second is copied
