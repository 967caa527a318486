"""Which GPU holds which expert, from the load of the experts (report §3.4; EPLB). Pure: no Megatron, no processes.

eplb.py        `rebalance_experts`: the published algorithm for redundant experts
placement.py   experts without copies, for training: which rank holds which
logged.py      the load of each expert from a run's log
plan.py        the load of each GPU under a plan, before and after
show.py        `dsv3 balance`
"""

from dsv3_megatron.balance.eplb import rebalance_experts

__all__ = ["rebalance_experts"]
