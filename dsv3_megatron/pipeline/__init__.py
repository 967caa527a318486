"""Pipeline schedules as tables: built, checked, simulated and drawn without torch or Megatron.

    >>> schedule = build_schedule("dualpipe", num_ranks=8, num_microbatches=20)
    >>> validate(schedule).peak_in_flight
    (9, 9, 9, 9, 9, 9, 9, 9)
    >>> simulate(schedule, Costs(f=1, b=2, w=1, fb=3)).makespan
    66

The runner that executes a table is `dsv3_megatron.pipeline.runner`; it is not imported here because it needs
torch.
"""

from .actions import Action, Kind, Schedule
from .build import SCHEDULES, build_schedule, zigzag_lower_bound
from .comms import Message
from .dealing import Budget
from .operations import Operation, host_operations
from .simulate import Costs, Event, Simulation, simulate
from .validate import ScheduleError, Validation, validate

__all__ = [
    "SCHEDULES",
    "Action",
    "Budget",
    "Costs",
    "Event",
    "Kind",
    "Message",
    "Operation",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Validation",
    "build_schedule",
    "host_operations",
    "simulate",
    "validate",
    "zigzag_lower_bound",
]
