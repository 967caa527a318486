"""Delayed weight gradients: equal to immediate ones, first in first out, with DDP, TP, sequence parallel."""

import contextlib
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.backends.linear import (
    ColumnLinear,
    DuplicatedLinear,
    RowLinear,
    num_pending_weight_grads,
    run_pending_weight_grads,
)
from tests.harness import run_distributed
from tests.specs.models import build, micro_config, random_batch

IN, OUT = 12, 20
KINDS = {"column": ColumnLinear, "row": RowLinear, "duplicated": DuplicatedLinear}


def make(kind: str, delay: bool, **config: Any) -> Any:
    """A linear layer IN → OUT whose full weight is the same in every layout."""
    fields = {
        "num_layers": 1,
        "hidden_size": IN,
        "num_attention_heads": 4,
        "add_bias_linear": False,
        **config,
    }
    settings = TransformerConfig(**fields, gradient_accumulation_fusion=False)
    settings.delay_wgrad_compute = delay  # the dataclass would insist on Transformer Engine and EP overlap
    options = {"config": settings, "init_method": torch.nn.init.zeros_, "bias": False, "skip_bias_add": False}
    if kind == "row":
        options["input_is_parallel"] = True
    layer = KINDS[kind](IN, OUT, **options)
    full = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rank, size = layer.tp_group.rank(), layer.tp_group.size()
    split = {"column": 0, "row": 1, "duplicated": None}[kind]
    part = full if split is None else full.chunk(size, split)[rank]
    layer.weight.data = part.to(layer.weight.dtype).clone()
    return layer


def microbatches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input [s=4, b=2, IN], gradient of the output [4, 2, OUT]) per microbatch."""
    generator = torch.Generator().manual_seed(2)
    return [
        tuple(torch.randn(4, 2, n, generator=generator).to(dtype) for n in (IN, OUT)) for _ in range(count)
    ]


@pytest.mark.usefixtures("single_rank")
class TestOneRank:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_equals_immediate(self, kind: str, dtype: torch.dtype) -> None:
        now, later = make(kind, False, params_dtype=dtype), make(kind, True, params_dtype=dtype)
        for x, grad in microbatches(2, dtype):
            x_now, x_later = (x.clone().requires_grad_() for _ in range(2))
            y_now, y_later = now(x_now)[0], later(x_later)[0]
            y_now.backward(grad)
            y_later.backward(grad)
            torch.testing.assert_close(y_now, y_later)
            torch.testing.assert_close(x_now.grad, x_later.grad)
        assert later.weight.grad is None
        later.backward_dw()
        later.backward_dw()
        torch.testing.assert_close(now.weight.grad, later.weight.grad)

    def test_first_in_first_out(self) -> None:
        layer = make("column", True)
        batches = microbatches(3)
        outputs = [layer(x.requires_grad_())[0] for x, _ in batches]
        for y, (_, grad) in zip(outputs, batches, strict=True):
            y.backward(grad)
        assert num_pending_weight_grads(layer) == 3
        total = torch.zeros(OUT, IN)
        for x, grad in batches:
            layer.backward_dw()
            total += torch.einsum("sbo,sbi->oi", grad, x.detach())
            torch.testing.assert_close(layer.weight.grad, total)
        assert num_pending_weight_grads(layer) == 0

    def test_nothing_queued_is_an_error(self) -> None:
        with pytest.raises(RuntimeError, match="no weight gradient is queued"):
            make("row", True).backward_dw()

    def test_does_nothing_when_not_delayed(self) -> None:
        layer = make("row", False)
        layer.backward_dw()
        assert layer.weight.grad is None

    def test_frozen_weight_has_no_queue(self) -> None:
        layer = make("column", True)
        layer.weight.requires_grad_(False)
        x = torch.randn(4, 2, IN, requires_grad=True)
        layer(x)[0].sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))
        assert num_pending_weight_grads(layer) == 0
        layer.backward_dw()

    def test_bias_is_refused(self) -> None:
        with pytest.raises(ValueError, match="--disable-bias-linear"):
            DuplicatedLinear(
                IN, OUT, config=make("row", True).config, init_method=torch.nn.init.zeros_, bias=True
            )

    @pytest.mark.parametrize("fusion", [False, True])
    @pytest.mark.parametrize("overlap", [False, True])
    def test_main_grad_with_ddp(self, overlap: bool, fusion: bool) -> None:
        """main_grad (fp32) sums over microbatches; with overlap a bucket is ready at its last W only."""
        module = torch.nn.Module()
        module.layer = make("column", True, params_dtype=torch.bfloat16)
        module.layer.gradient_accumulation_fusion = fusion
        weight = module.layer.weight
        ddp_config = DistributedDataParallelConfig(
            overlap_grad_reduce=overlap, grad_reduce_in_fp32=True, delay_wgrad_compute=True
        )
        ddp = DistributedDataParallel(module.layer.config, ddp_config, module)
        (bucket_group,) = ddp.bucket_groups
        for _ in range(2):  # Megatron learns in the first step how often each gradient becomes ready
            ddp.zero_grad_buffer()
            expected = torch.zeros(OUT, IN)
            for last, (x, grad) in zip((False, False, True), microbatches(3, torch.bfloat16), strict=True):
                with contextlib.nullcontext() if last else ddp.no_sync():
                    module.layer(x.requires_grad_())[0].backward(grad)
                    torch.testing.assert_close(weight.main_grad, expected, rtol=0.02, atol=0.02)
                    assert not bucket_group.per_param_grad_ready_counts
                    module.layer.backward_dw()
                expected += torch.einsum("sbo,sbi->oi", grad.float(), x.detach().float())
                assert bucket_group.per_param_grad_ready_counts == ({weight: 1} if overlap and last else {})
            ddp.finish_grad_sync()
            assert weight.main_grad.dtype == torch.float32 and weight.grad is None
            torch.testing.assert_close(weight.main_grad, expected, rtol=0.02, atol=0.02)

    def test_ddp_without_delay_is_an_error(self) -> None:
        module = torch.nn.Module()
        module.layer = make("column", True)
        DistributedDataParallel(module.layer.config, DistributedDataParallelConfig(), module)
        module.layer(torch.randn(4, 2, IN, requires_grad=True))[0].sum().backward()
        with pytest.raises(RuntimeError, match="delay_wgrad_compute=True in DistributedDataParallelConfig"):
            module.layer.backward_dw()

    def test_whole_model(self) -> None:
        """Every gradient of a model with MTP and an expert without tokens, delayed against immediate."""
        grads = []
        for delay in (False, True):
            config = micro_config(mtp_num_layers=1, moe_aux_loss_coeff=0.0)
            config.transformer.delay_wgrad_compute = delay
            model = build(config)
            for name, buffer in model.named_buffers():
                if name.endswith("expert_bias"):
                    buffer[1] = -100.0
            for seed in (0, 1):
                model(**random_batch(seed=seed), attention_mask=None).mean().backward()
            if delay:
                waiting = num_pending_weight_grads(model)
                assert waiting > 0
                for left in (waiting // 2, 0):
                    run_pending_weight_grads(model)
                    assert num_pending_weight_grads(model) == left
            grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert grads[0].keys() == grads[1].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(grad, grads[1][name], msg=lambda text, name=name: f"{name}: {text}")
        idle = [grad for name, grad in grads[1].items() if "local_experts.1." in name]
        assert idle and all(not grad.any() for grad in idle)


def tensor_parallel_gradients(rank: int, world_size: int, kind: str, delay: bool) -> tuple[torch.Tensor, ...]:
    """Whole output, input gradient and weight gradient of one layer under TP + sequence parallel."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)
    layer = make(kind, delay, tensor_model_parallel_size=world_size, sequence_parallel=world_size > 1)
    ((x, grad),) = microbatches(1)
    dim_in = {"column": 0, "row": 2, "duplicated": 0}[
        kind
    ]  # 0: part of the sequence, 2: part of the features
    dim_out = {"column": 2, "row": 0, "duplicated": 0}[kind]
    x = x.chunk(world_size, dim_in)[rank].clone().requires_grad_()
    y = layer(x)[0]
    y.backward(grad.chunk(world_size, dim_out)[rank])
    layer.backward_dw()
    weight_grad = layer.weight.grad

    def join(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim)

    if kind == "duplicated":
        assert layer.weight.sequence_parallel == (world_size > 1)
        dist.all_reduce(weight_grad)  # as finalize_model_grads does for parameters marked sequence_parallel
    else:
        weight_grad = join(weight_grad, {"column": 0, "row": 1}[kind])
    return join(y.detach(), dim_out), join(x.grad, dim_in), weight_grad


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallel(kind: str) -> None:
    one = run_distributed(tensor_parallel_gradients, world_size=1, kind=kind, delay=False)[0]
    for delay in (False, True):
        two = run_distributed(tensor_parallel_gradients, world_size=2, kind=kind, delay=delay)[0]
        for expected, got in zip(one, two, strict=True):
            torch.testing.assert_close(got, expected)
