"""One process of the real trainer on a tiny budget, with what each of its steps was run with."""

from typing import Any

from tests.arguments.lines import MICRO

SEQ = 32


def words(samples: int, batch: tuple[int, int, int], *more: str) -> list[str]:
    """The micro model on the schedules over so many samples; `batch` is START, END and INCREMENT of the ramp."""
    drop = {"--global-batch-size", "--train-iters"}
    micro = [
        w for before, w in zip(["", *MICRO], MICRO, strict=False) if w not in drop and before not in drop
    ]
    start, end, increment = map(str, batch)
    recipe = [
        "--train-tokens",
        str(samples * SEQ),
        "--global-batch-size",
        end,
        "--batch-ramp",
        start,
        increment,
    ]
    rest = ["--num-layers", "2", "--moe-layer-freq", "[0]*1+[1]*1", "--use-distributed-optimizer"]
    rest += ["--dist-ckpt-optim-fully-reshardable", "--log-interval", "1000"]
    return ["--spec", "dsv3", "--device", "cpu", *micro, *recipe, *rest, *more]


def train(rank: int, world_size: int, words: list[str]) -> list[dict[str, Any]]:
    """Train; of every step, as Megatron's own objects had it: samples before it, lr, batch, γ, λ, microbatches."""
    from dsv3_megatron import train
    from dsv3_megatron.training import hooks, step

    records: list[dict[str, Any]] = []

    def record(call: dict[str, Any]) -> None:
        from megatron.core.num_microbatches_calculator import get_current_global_batch_size
        from megatron.training import get_args

        records.append(
            {
                "samples": get_args().consumed_train_samples,
                "lr": call["optimizer"].param_groups[0]["lr"],
                "batch": get_current_global_batch_size(),
                "gamma": call["config"].moe_router_bias_update_rate,
                "mtp_weight": call["config"].mtp_loss_scaling_factor,
            }
        )

    original, forwards = step.forward_step, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        forwards[0] += 1
        return original(*args, **kwargs)

    def count(call: dict[str, Any], result: Any) -> None:
        records[-1]["forwards"], forwards[0] = forwards[0], 0

    step.forward_step = counted
    hooks.before_update(record)  # after forward and backward, with the values that they have used
    hooks.after_step(count)
    try:
        train.main(words)
    except SystemExit as left:  # how Megatron ends at --exit-interval
        assert not left.code
    return records
