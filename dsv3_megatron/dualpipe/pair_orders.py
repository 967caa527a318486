"""What follows what in an overlapped pair: the nodes of two schedule plans, layer by layer, as tables.

A layer of a plan is four nodes (attention, dispatch, MLP, combine) and, in the MTP layer, a fifth at its end.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class NodeStep(NamedTuple):
    """One entry of an order: `operation` ("forward", "backward", "backward_dw") of a layer's `node`, for one half."""

    half: Literal["F", "B"]
    node: str
    operation: str


ATTENTION, DISPATCH, MLP, COMBINE, MTP = (
    "pre_dispatch_computation",  # with the router and the shared expert
    "moe_dispatch",
    "mlp",
    "moe_combine",
    "mtp_post_process",
)
COMMUNICATION = (DISPATCH, COMBINE)
_NAMES = {ATTENTION: "attention", DISPATCH: "dispatch", MLP: "MLP", COMBINE: "combine", MTP: "MTP end"}

# Per layer; nodes that a layer does not have are passed over. Both begin and end with the MTP layer's last node.
ORDERS: dict[str, tuple[NodeStep, ...]] = {
    # As `TransformerLayerSchedulePlan.run`.
    "megatron": (
        NodeStep("B", MTP, "backward"),
        NodeStep("B", COMBINE, "backward"),
        NodeStep("F", ATTENTION, "forward"),
        NodeStep("B", MLP, "backward"),
        NodeStep("F", DISPATCH, "forward"),
        NodeStep("B", MLP, "backward_dw"),
        NodeStep("B", DISPATCH, "backward"),
        NodeStep("F", MLP, "forward"),
        NodeStep("F", COMBINE, "forward"),
        NodeStep("B", ATTENTION, "backward"),
        NodeStep("F", MTP, "forward"),
        NodeStep("B", ATTENTION, "backward_dw"),
    ),
    # As DeepSeek's profile of training shows it (report §3.2.1, figure 4; the published trace).
    "report": (
        NodeStep("B", MTP, "backward"),
        NodeStep("B", COMBINE, "backward"),
        NodeStep("F", ATTENTION, "forward"),
        NodeStep("B", MLP, "backward"),
        NodeStep("F", DISPATCH, "forward"),
        NodeStep("B", DISPATCH, "backward"),
        NodeStep("B", MLP, "backward_dw"),
        NodeStep("F", MLP, "forward"),
        NodeStep("B", ATTENTION, "backward"),
        NodeStep("B", ATTENTION, "backward_dw"),
        NodeStep("F", COMBINE, "forward"),
        NodeStep("F", MTP, "forward"),
    ),
}


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A measured node of a pair: `layer` counts within the chunk, times are `time.perf_counter()` in seconds."""

    step: NodeStep
    layer: int
    start: float
    end: float

    @property
    def lane(self) -> str:
        return "communication" if self.step.node in COMMUNICATION else "compute"

    def __str__(self) -> str:
        node = _NAMES[self.step.node]
        operation = {"forward": "F", "backward": "B", "backward_dw": "W"}[self.step.operation]
        return f"{operation} {node} {self.layer}"
