"""What a dry run says of a rank."""

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import DictConfig

from dsv3_megatron.dryrun.count import Weight, total, weights_of
from dsv3_megatron.dryrun.world import FakeWorld


@dataclass
class RankReport:
    """A rank and its model.

    Attributes:
        world_size, rank: of the job.
        stages: pipeline stages whose modules the rank holds, from 0; with virtual stages, one per chunk.
        layers: decoder layers it holds, from 0.
        mtp_layers: MTP layers it holds, numbered on after the decoder layers, as in the released checkpoint.
        num_parameters: elements of all parameters on this rank, copies included.
        total_parameters: elements of the model, each parameter once, from the modules of all stages.
        total_parameters_without_mtp: the same less MTP's own.
        groups: ranks in each group, see `FakeWorld.group_sizes`.
        by_kind: elements on this rank by module kind.
        expert_slots: for serving, of a MoE layer: slots on all ranks and on one, different experts in them, those that
            this rank holds first, and the most copies of one (of the shared expert where it is routed).
    """

    world_size: int
    rank: int
    stages: list[int]
    layers: list[int]
    mtp_layers: list[int]
    num_parameters: int
    total_parameters: int
    total_parameters_without_mtp: int
    groups: dict[str, int]
    by_kind: dict[str, int] = field(default_factory=dict)
    expert_slots: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without `expert_slots` for a training layout."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def table(self) -> str:
        """For people."""
        rows = [
            ("rank", f"{self.rank} of {self.world_size}"),
            ("pipeline stage", ", ".join(map(str, self.stages))),
            ("decoder layers", _ranges(self.layers) or "none"),
            ("MTP layers", _ranges(self.mtp_layers) or "none"),
            ("groups", ", ".join(f"{name} {size}" for name, size in self.groups.items())),
            ("parameters on rank", _count(self.num_parameters)),
            *((f"  {kind}", _count(size)) for kind, size in self.by_kind.items()),
            *((key.replace("_", " "), str(value)) for key, value in (self.expert_slots or {}).items()),
            ("parameters of model", _count(self.total_parameters)),
            ("  without MTP", _count(self.total_parameters_without_mtp)),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def build_rank(cfg: DictConfig, rank: int, progress: bool = False) -> RankReport:
    """Build rank `rank` of the job that `cfg` (from `dsv3_megatron.conf.compose`) describes, and all stages
    for the totals.

    Needs a process without torch.distributed, in which `dsv3_megatron.cpu.activate()` was called. With
    `progress`, stderr says what is being done.

    Errors: ConfigError when the job has no such rank or Megatron refuses its arguments.
    """

    def say(text: str) -> None:
        if progress:
            print(text, file=sys.stderr, flush=True)

    say(f"rank {rank}: making Megatron's groups")
    with FakeWorld.of(cfg, rank) as world:
        num_ranks = world.groups.pp.size()
        num_layers = world.args.num_layers
        of_model: list[Weight] = []
        for pipeline_rank in range(num_ranks):
            say(f"building pipeline rank {pipeline_rank + 1} of {num_ranks}")
            chunks = world.build_chunks(pipeline_rank)
            weights = [weights_of(chunk) for chunk in chunks]
            of_model += [weight for chunk in weights for weight in chunk]
            if pipeline_rank == world.pipeline_rank:
                own, slots = weights, _slots(chunks)
        held = [weight for chunk in own for weight in chunk]
        by_kind: dict[str, int] = {}
        for weight in held:
            by_kind[weight.kind] = by_kind.get(weight.kind, 0) + weight.local_size
        return RankReport(
            world_size=world.world_size,
            rank=rank,
            stages=world.stages(),
            layers=sorted({w.layer for w in held if w.layer is not None and not w.mtp}),
            mtp_layers=sorted({num_layers + w.layer for w in held if w.layer is not None and w.mtp}),
            num_parameters=sum(weight.local_size for weight in held),
            total_parameters=total(of_model),
            total_parameters_without_mtp=total(of_model, mtp=False),
            groups=world.group_sizes(),
            by_kind=by_kind,
            expert_slots=slots,
        )


def _slots(chunks: list[Any]) -> dict[str, Any] | None:
    """Of the first MoE layer with slots for copies of experts."""
    layers = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "slots")]
    if not layers:
        return None
    moe = layers[0]
    counts = moe.slots.held.bincount(minlength=moe.slots.num_choices)
    return {
        "expert_slots": moe.slots.num_experts,
        "slots_per_rank": moe.num_local_experts,
        "experts_in_slots": moe.slots.num_choices,
        "held_here": moe.local_expert_indices,
        "most_copies": int(counts.max()),
        "shared_as_routed": moe.slots.shared_as_routed,
    }


def _count(number: int) -> str:
    return f"{number:,} ({number / 1e9:.2f}B)" if number >= 10**7 else f"{number:,}"


def _ranges(numbers: list[int]) -> str:
    if not numbers:
        return ""
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        return f"{numbers[0]}-{numbers[-1]} ({len(numbers)})"
    return ", ".join(map(str, numbers))
