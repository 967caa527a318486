"""Grace's constants from the fitted half of `published/`: `python -m dsv3_megatron.plan.calibration_host`.

From the odd steps of Megatron's guide: what changes there is the host's work. The others' hosts follow from Grace by a
published measurement (`host_time.py`), so nothing of them is fitted; nothing of the judges is read.
"""

from collections.abc import Sequence
from dataclasses import replace

from dsv3_megatron.pipeline import simulate
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.host_time import GRACE, Host
from dsv3_megatron.plan.published import RUNS, Run
from dsv3_megatron.plan.stage_times import costs
from dsv3_megatron.plan.step import schedule_of, update

# Microseconds of a kernel, a module and an expert's product, and how much longer without binding: first step, lowest
# value.
_STEPS = {"kernel": (4.0, 2.0), "module": (60.0, 20.0), "product": (40.0, 0.0), "unbound": (0.3, 1.0)}


def rows() -> list[Run]:
    """The odd steps of Megatron's guide."""
    return [run for run in RUNS if run.half == "fitted" and ", step " in run.name]


def fit(host: Host = GRACE, names: Sequence[str] = tuple(_STEPS)) -> Host:
    """Least squares of the relative errors of the step, by coordinate descent."""
    runs = rows()
    tables = [schedule_of(run.job) for run in runs]

    def error(candidate: Host) -> float:
        total = 0.0
        for run, table in zip(runs, tables, strict=True):
            gpu = replace(GPUS[run.gpu], host=candidate)
            seconds = simulate(table, costs(run.job, gpu)).makespan
            seconds += update(run.job, gpu, run.counts, table).seconds
            total += (seconds / run.step_s - 1) ** 2
        return total

    best, scale = error(host), 1.0
    while scale > 0.1:
        improved = False
        for name in names:
            unit = 1.0 if name == "unbound" else 1e-6
            step, low = _STEPS[name]
            for sign in (1, -1):
                value = getattr(host, name) + sign * scale * step * unit
                candidate = replace(host, **{name: value})
                if value >= low * unit and (found := error(candidate)) < best * 0.999:
                    best, host, improved = found, candidate, True
        scale = scale if improved else scale / 2
    return host


def main() -> None:
    def text(host: Host) -> str:
        values = (f"{getattr(host, name) * 1e6:.1f} us a {name}" for name in ("kernel", "module", "product"))
        return f"{', '.join(values)}, ×{host.unbound:.2f} unbound"

    print(f"grace: {text(fit())} (table: {text(GRACE)})")


if __name__ == "__main__":
    main()
