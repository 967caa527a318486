"""Gradient accumulation fusion without Apex, in the trainer: the same gradients as without it, in fp32."""

import torch

from tests.arguments.lines import MICRO
from tests.harness import run_distributed

Gradients = dict[str, torch.Tensor]


def train(rank: int, world_size: int, words: list[str]) -> tuple[float, Gradients]:
    """Loss of the last step, and the first step's gradients by name, as the optimizer finds them."""
    from dsv3_megatron import metrics
    from dsv3_megatron.train import main
    from dsv3_megatron.training import hooks

    gradients: Gradients = {}

    def keep(call: dict) -> None:
        if not gradients:
            for chunk in call["model"]:
                gradients.update((name, p.main_grad.clone()) for name, p in chunk.named_parameters())

    hooks.before_update(keep)
    main(["--spec", "dsv3", "--device", "cpu", "--log-interval", "1", *MICRO, *words])
    return metrics.latest()["lm_loss"], gradients


def with_and_without(words: str) -> tuple[tuple[float, Gradients], tuple[float, Gradients]]:
    off = "--no-gradient-accumulation-fusion"
    runs = [
        run_distributed(train, world_size=1, init=False, timeout=200, words=[*words.split(), *more])[0]
        for more in ([], [off])
    ]
    return runs[0], runs[1]


def linears(gradients: Gradients) -> list[str]:
    return [name for name in gradients if ".linear_" in name or "output_layer" in name or "eh_proj" in name]


def test_fp32_training_is_the_same() -> None:
    (loss, fused), (plain_loss, plain) = with_and_without("")
    assert abs(loss - plain_loss) < 1e-5 * plain_loss
    assert len(linears(fused)) > 20
    for name, gradient in plain.items():
        assert (fused[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-12), name


def test_bf16_training_accumulates_in_fp32() -> None:
    """One microbatch: without fusion each Linear's gradient is a bf16 number; with it, it is not rounded."""
    (_, fused), (_, plain) = with_and_without(
        "--bf16 --use-distributed-optimizer --global-batch-size 1 --train-iters 1"
    )

    def rounded(gradient: torch.Tensor) -> float:
        """Share of the numbers that bf16 holds exactly."""
        return float((gradient.bfloat16().float() == gradient).float().mean())

    names = [name for name in linears(plain) if plain[name].count_nonzero() > plain[name].numel() / 2]
    assert len(names) > 10
    for name in names:
        assert rounded(plain[name]) == 1.0, name
        assert rounded(fused[name]) < 0.5, name
        assert (fused[name] - plain[name]).norm() < 0.01 * plain[name].norm(), name
