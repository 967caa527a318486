"""Build any rank of any layout without its cluster: real Megatron groups and modules, no memory, no network.

`build_rank(cfg, rank)` answers what a rank holds; `FakeWorld` is the process that pretends to be that rank,
for who wants the modules themselves.

    python -m dsv3_megatron.dryrun model=v3_671b layout=pp16_ep64 rank=2047
"""

from dsv3_megatron.dryrun.count import Weight, total, weights_of
from dsv3_megatron.dryrun.report import RankReport, build_rank
from dsv3_megatron.dryrun.world import FakeWorld

__all__ = ["FakeWorld", "RankReport", "Weight", "build_rank", "total", "weights_of"]
