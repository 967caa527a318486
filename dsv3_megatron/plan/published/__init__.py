"""Other people's published runs of DeepSeek-V3 and of models like it, as jobs: what the constants are fitted on, and
what judges them.

Which is which was written here before anything was fitted: of each domain (hardware, dispatcher, precision) that had
more than one run the named one is fitted, of the thirteen steps of Megatron's guide the odd ones; the others are
judges, with which in view the form of the model was settled. Then new runs were collected, unseen by those who shaped
the model, and opened once (`Run.half`, docs/plan.md). Each run names its source, and what the source leaves open and is
assumed here.

Routing is forced to be even, or tokens are dropped and padded to a capacity, unless a run says otherwise.
"""

from dsv3_megatron.plan.published.exchange import ALL_TO_ALL_US
from dsv3_megatron.plan.published.hopper import HOPPER
from dsv3_megatron.plan.published.mlperf import MLPERF
from dsv3_megatron.plan.published.nvl8 import NVL8
from dsv3_megatron.plan.published.nvl72 import NVL72
from dsv3_megatron.plan.published.opened import OPENED
from dsv3_megatron.plan.published.run import ATTN_ROUTER, Run
from dsv3_megatron.plan.published.small import SMALL

__all__ = ["ALL_TO_ALL_US", "ATTN_ROUTER", "RUNS", "Run"]

RUNS: tuple[Run, ...] = (*HOPPER, *NVL8, *NVL72, *OPENED, *MLPERF, *SMALL)
