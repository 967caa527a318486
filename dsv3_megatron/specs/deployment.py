"""How a model is laid out for serving beyond its parallel groups (report §3.4): copies of experts, whole MLPs.

Training has none of it. A configuration of Megatron's carries it as an attribute, so that one set of specs builds both.
"""

import copy
from dataclasses import dataclass
from typing import Any

__all__ = ["PLAIN", "Deployment", "alone", "deploy", "deployment_of"]

_ATTRIBUTE = "dsv3_deployment"


@dataclass(frozen=True)
class Deployment:
    """What serving adds to a layout.

    Attributes:
        extra_slots: experts on the GPUs beyond the model's routed ones: copies, and the shared one where it is routed.
        shared_as_routed: the shared expert is one more routed one, which every token chooses with weight 1.
        whole_mlps: dense MLPs and shared experts are whole on every tensor-parallel rank (TP1), which applies them to
            its own part of the tokens.
        microbatches: parts of a forward pass that run overlapped, one's messages beside the other's products: 1 or 2.
    """

    extra_slots: int = 0
    shared_as_routed: bool = False
    whole_mlps: bool = False
    microbatches: int = 1

    @property
    def has_slots(self) -> bool:
        """Whether the router's experts are not simply those on the GPUs."""
        return self.extra_slots > 0

    def num_choices(self, num_experts: int) -> int:
        """Different experts that slots hold: the routed ones, and the shared one where it is routed."""
        return num_experts + int(self.shared_as_routed)

    def num_slots(self, num_experts: int) -> int:
        """Experts on all GPUs together, copies counted."""
        return num_experts + self.extra_slots

    def check(self, num_experts: int, num_shared: int, expert_parallel_size: int) -> None:
        """Raise ValueError where the slots cannot be dealt out; the text names sizes."""
        if self.extra_slots < 0:
            raise ValueError(f"{self.extra_slots} redundant experts: 0 or more")
        if self.microbatches not in (1, 2):
            raise ValueError(f"{self.microbatches} microbatches: 1, or 2 that overlap")
        if self.extra_slots and not num_experts:
            raise ValueError(f"{self.extra_slots} redundant experts: the model has no experts")
        if self.shared_as_routed and num_shared != 1:
            raise ValueError(
                f"the shared expert routed as one more: the model has {num_shared} of them, not 1"
            )
        if self.shared_as_routed and not self.extra_slots:
            raise ValueError("the shared expert routed as one more: needs a redundant slot at least, its own")
        if num_experts and self.num_slots(num_experts) % expert_parallel_size:
            raise ValueError(
                f"{num_experts} + {self.extra_slots} experts do not lie evenly on {expert_parallel_size} "
                "expert-parallel ranks"
            )


PLAIN = Deployment()


def deploy(config: Any, deployment: Deployment) -> None:
    """Build what comes of this configuration for serving."""
    setattr(config, _ATTRIBUTE, deployment)


def deployment_of(config: Any) -> Deployment:
    """Of a configuration of Megatron's; nothing special by default."""
    found = getattr(config, _ATTRIBUTE, None)
    return PLAIN if found is None else found


def alone(config: Any, pg_collection: Any) -> tuple[Any, Any]:
    """Configuration and groups of a module that is whole on each tensor-parallel rank: TP1, no sequence parallelism.

    Its group is that of expert tensor parallelism, which has one rank here.
    """
    config, groups = copy.copy(config), copy.copy(pg_collection)
    config.tensor_model_parallel_size, config.sequence_parallel = 1, False
    groups.tp = groups.expt_tp
    return config, groups
