"""A small torch model cut into stages, the same for every schedule, and its gradients without a pipeline."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_megatron import cpu
from dsv3_megatron.dualpipe.p2p import PipelineP2P
from dsv3_megatron.pipeline import build_schedule, simulate
from dsv3_megatron.pipeline.autograd_stage import AutogradStage, WeightGradients
from dsv3_megatron.pipeline.comms import Message
from dsv3_megatron.pipeline.runner import PipelineRunner

BATCH = 3


class _PutOff(torch.autograd.Function):
    """y = x W^T + b, whose weight gradient goes through `WeightGradients`."""

    @staticmethod
    def forward(ctx, x, weight, bias, owner):
        ctx.save_for_backward(x, weight)
        ctx.owner = owner
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        owner = ctx.owner

        def weight_gradient():
            for parameter, value in ((owner.weight, grad.T @ x), (owner.bias, grad.sum(0))):
                parameter.grad = value if parameter.grad is None else parameter.grad + value
            owner.computed += 1

        owner.weight_gradients.put(weight_gradient)
        return grad @ weight, None, None, None


class PutOffLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, weight_gradients: WeightGradients) -> None:
        super().__init__(inputs, outputs, dtype=torch.float64)
        self.weight_gradients = weight_gradients
        self.computed = 0

    def forward(self, x: Tensor) -> Tensor:
        return _PutOff.apply(x, self.weight, self.bias, self)


def width(stage: int) -> int:
    """Features that enter a stage: different at every boundary, so that mixed-up messages cannot pass
    unseen."""
    return 3 + stage % 5


def module(stage: int, weight_gradients: WeightGradients) -> nn.Module:
    torch.manual_seed(100 + stage)
    return nn.Sequential(
        PutOffLinear(width(stage), 6, weight_gradients),
        nn.Tanh(),
        PutOffLinear(6, width(stage + 1), weight_gradients),
    )


def first_input(microbatch: int) -> Tensor:
    return torch.randn(
        BATCH, width(0), dtype=torch.float64, generator=torch.Generator().manual_seed(microbatch)
    )


def loss(num_stages: int, num_microbatches: int):
    def mean_square(output: Tensor, microbatch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + microbatch)
        target = torch.randn(BATCH, width(num_stages), dtype=torch.float64, generator=generator)
        return (output - target).square().mean() / num_microbatches

    return mean_square


def reference(num_stages: int, num_microbatches: int) -> tuple[dict[int, float], dict[int, list[Tensor]]]:
    """Losses by microbatch and gradients by stage, in one process, with torch's own Linear."""
    stages = []
    for stage in range(num_stages):
        layers = module(stage, WeightGradients())
        plain = nn.Sequential(*(layers[0:1]), nn.Tanh(), layers[2])
        for i in (0, 2):
            linear = nn.Linear(layers[i].in_features, layers[i].out_features, dtype=torch.float64)
            linear.load_state_dict(layers[i].state_dict())
            plain[i] = linear
        stages.append(plain)
    losses = {}
    for microbatch in range(num_microbatches):
        x = first_input(microbatch)
        for stage in stages:
            x = stage(x)
        value = loss(num_stages, num_microbatches)(x, microbatch)
        value.backward()
        losses[microbatch] = value.item()
    return losses, {number: [p.grad for p in stage.parameters()] for number, stage in enumerate(stages)}


def build(schedule, rank: int, p2p: PipelineP2P | None) -> tuple[PipelineRunner, dict[int, AutogradStage]]:
    stages = {}
    for stage, _ in schedule.stages_of(rank):
        weight_gradients = WeightGradients()
        stages[stage] = AutogradStage(
            module(stage, weight_gradients),
            weight_gradients,
            first_input if stage == 0 else None,
            loss(schedule.num_stages, schedule.num_microbatches)
            if stage == schedule.num_stages - 1
            else None,
        )
    return PipelineRunner(schedule, rank, stages, p2p), stages


def tensor_spec(message: Message) -> tuple[tuple[int, int], torch.dtype]:
    boundary = message.stage + (message.channel.payload == "gradient")
    return (BATCH, width(boundary)), torch.float64


def run_schedules(
    rank: int, world_size: int, names: list[tuple[str, int]], num_steps: int = 1, like_nccl: bool = False
) -> dict:
    """Every (schedule name, microbatches) in turn over the same channels; returns losses, gradients and
    events."""
    if like_nccl:
        cpu.behave_like_nccl(limit_s=60)
    p2p = PipelineP2P(list(range(world_size)), tensor_spec, timeout_s=30) if world_size > 1 else None
    results = {}
    for name, num_microbatches in names:
        schedule = build_schedule(name, world_size, num_microbatches)
        runner, stages = build(schedule, rank, p2p)
        for _ in range(num_steps):
            if dist.is_initialized():
                dist.barrier()
            events = runner.step()
        results[name, num_microbatches] = {
            "losses": {m: value.item() for stage in stages.values() for m, value in stage.losses.items()},
            "grads": {
                number: [p.grad for p in stage.module.parameters()] for number, stage in stages.items()
            },
            "computed": {
                number: [stage.module[i].computed for i in (0, 2)] for number, stage in stages.items()
            },
            "events": events,
        }
        planned = [event.action for event in simulate(schedule).events if event.rank == rank]
        assert [event.action for event in events] == planned
    return results
