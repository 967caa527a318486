"""Layouts whose tokens go in two hops."""

import dataclasses

from dsv3_megatron import dispatch
from tests.dualpipe.common import ScheduledLayout
from tests.parallel.common import Layout

TWO_HOP = (("moe_token_dispatcher_type", "two_hop"),)


def two_hop(node_size: int, chunks: int = 3) -> None:
    """What the trainer does before it builds a model."""
    dispatch.install()
    dispatch.activate(node_size, chunks)


@dataclasses.dataclass(frozen=True)
class TwoHopLayout(Layout):
    """`node_size` ranks to a node, by their global number."""

    node_size: int = 2
    hops: int = 3  # parts of a dispatch; `chunks` are those of a zigzag

    def initialize(self) -> None:
        two_hop(self.node_size, self.hops)
        super().initialize()


@dataclasses.dataclass(frozen=True)
class ScheduledTwoHopLayout(ScheduledLayout):
    """The same under one of our schedules."""

    node_size: int = 2
    hops: int = 3  # parts of a dispatch; `chunks` are those of a zigzag

    def initialize(self) -> None:
        two_hop(self.node_size, self.hops)
        super().initialize()
