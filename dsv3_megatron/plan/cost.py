"""GPU-hours, days and money for a token budget."""

from dsv3_megatron.plan import deepseek
from dsv3_megatron.plan.step import Plan


def cost(plan: Plan, tokens: float, price: float) -> dict[str, float]:
    """What training on `tokens` takes at `price` dollars per GPU-hour; restarts and idle nodes are not counted."""
    hours = plan.gpu_hours(tokens)
    return {
        "tokens": tokens,
        "gpu_hours": hours,
        "days": plan.days(tokens),
        "dollars": hours * price,
        "dollars_per_gpu_hour": price,
    }


def cost_table(plan: Plan, tokens: float, price: float) -> str:
    """`cost` for people."""
    of = cost(plan, tokens, price)
    return (
        f"{tokens:.4g} tokens: {of['gpu_hours'] / 1e3:.0f}K GPU-hours, {of['days']:.1f} days on "
        f"{plan.job.layout.num_gpus} GPUs, ${of['dollars'] / 1e6:.3f}M at ${price:g} per GPU-hour"
    )


def report_totals(
    gpu_hours_per_1t: float, price: float = deepseek.DOLLARS_PER_GPU_HOUR
) -> list[tuple[str, float, float]]:
    """(phase, K GPU-hours, M dollars) of DeepSeek-V3, pre-training at the given rate (Table 1 of the report).

    Long context and post-training are the report's hours: their batches and lengths differ from those planned here.
    """
    rows = [
        ("pre-training", gpu_hours_per_1t * deepseek.PRETRAINING_TOKENS / 1e12),
        ("long context", deepseek.LONG_CONTEXT_HOURS),
        ("post-training", deepseek.POST_TRAINING_HOURS),
    ]
    rows.append(("total", sum(hours for _, hours in rows)))
    return [(phase, hours / 1e3, hours * price / 1e6) for phase, hours in rows]
