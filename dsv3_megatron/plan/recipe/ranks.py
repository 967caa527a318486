"""Which phases of a batch ramp a layout can run, and on how many ranks.

    python -m dsv3_megatron.plan.recipe.ranks model=v3_671b layout=pp16_ep64

Words are overrides of dsv3_megatron.train_hydra; `output=json` prints one JSON object, {"phases": [...]}, as the last
line. Exit status 2 when a batch size of the ramp fits no number of data-parallel ranks.
"""

import json
import sys
from collections.abc import Sequence
from math import gcd
from typing import Any

from dsv3_megatron.conf import ConfigError, compose
from dsv3_megatron.conf.check import data_parallel_size, positive, size
from dsv3_megatron.errors import exits_cleanly
from dsv3_megatron.recipe.arguments import ramp_of
from dsv3_megatron.recipe.plan import Phase, Replicas, plan


@exits_cleanly
def main(words: Sequence[str] | None = None) -> None:
    """Print the phases; RefusedArgument where one is impossible."""
    words = list(sys.argv[1:] if words is None else words)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    as_json = "output=json" in words
    cfg = compose([word for word in words if word not in ("output=json", "output=table")])
    if cfg.get("train_tokens") is not None:
        cfg.train_tokens = int(float(cfg.train_tokens))
    try:
        ramp = ramp_of(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if ramp is None:
        raise ConfigError("batch_ramp: this recipe has a constant batch; nothing to plan")
    available = replicas_from(cfg)
    phases = plan(ramp, available)
    rows = [describe(phase, cfg, available) for phase in phases]
    for phase in phases:
        if phase.replicas is None:
            least = available.least_microbatches
            raise ConfigError(
                f"batch_ramp={list(cfg.batch_ramp)}: batch size {phase.batch_sizes[0]} does not give a multiple of "
                f"{available.block} data-parallel ranks at least {max(1, least)} whole microbatches: choose another "
                "START or INCREMENT, or a layout with fewer pipeline ranks"
            )
    print(json.dumps({"phases": rows}) if as_json else table(rows))


def replicas_from(cfg: Any) -> Replicas:
    """What a batch of a composed configuration is divided over."""
    columns = size(cfg, "tensor") * size(cfg, "context")
    experts = size(cfg, "expert") * positive(cfg, "expert_tensor_parallel_size", default=size(cfg, "tensor"))
    return Replicas(
        data_parallel_size(cfg),
        size(cfg, "pipeline"),
        cfg.get("pipeline_schedule") or "1f1b",
        cfg.micro_batch_size,
        block=experts // gcd(experts, columns),
    )


def describe(phase: Phase, cfg: Any, available: Replicas) -> dict[str, Any]:
    """A phase as a row: where it begins, its batch sizes, ranks, and microbatches of its first and last batch size."""
    sizes = phase.batch_sizes
    row: dict[str, Any] = {
        "first_step": phase.first_step,
        "first_token": phase.first_sample * cfg.seq_length,
        "batch": [sizes[0], sizes[-1]],
        "data_parallel_size": None,
    }
    if phase.replicas is not None:
        dp = phase.replicas.data_parallel_size
        ranks = dp * size(cfg, "tensor") * size(cfg, "context") * size(cfg, "pipeline")
        counts = [phase.replicas.microbatches(batch)[0] for batch in (sizes[0], sizes[-1])]
        row.update(data_parallel_size=dp, world_size=ranks, microbatches=counts)
    row["fewer_ranks"] = phase.replicas is not None and phase.replicas != available
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The phases for people."""
    lines = [
        f"{'from step':>10} {'from token':>11} {'batch':>13} {'processes':>9} {'DP':>5} {'microbatches':>12}"
    ]
    for row in rows:
        batch, count = (f"{a}-{b}" if a != b else str(a) for a, b in (row["batch"], row["microbatches"]))
        note = "  fewer ranks than there are" if row["fewer_ranks"] else ""
        lines.append(
            f"{row['first_step']:>10} {row['first_token'] / 1e9:>10.1f}B {batch:>13} {row['world_size']:>9} "
            f"{row['data_parallel_size']:>5} {count:>12}{note}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
