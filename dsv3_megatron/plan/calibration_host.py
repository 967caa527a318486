"""The host's constants from the fitted half of `published.py`: `python -m dsv3_megatron.plan.calibration_host`.

Grace from the odd steps of Megatron's guide (what changes there is the host's work); x86 from all fitted runs on such
machines, each at its clock. The run without fused attention is left out: what it lacks is no host's time. Nothing of
the judges is read.
"""

from dataclasses import replace

from dsv3_megatron.pipeline import simulate
from dsv3_megatron.plan.hardware import GPUS
from dsv3_megatron.plan.host_time import GRACE, X86, Host
from dsv3_megatron.plan.published import RUNS, Run
from dsv3_megatron.plan.stage_times import costs
from dsv3_megatron.plan.step import schedule_of, update

# Microseconds of a kernel and of a module, and how much longer without binding: first step, lowest value.
_STEPS = {"kernel": (4.0, 2.0), "module": (80.0, 30.0), "unbound": (0.3, 1.0)}


def rows(host: Host) -> list[Run]:
    """Fitted runs on machines with this host, with fused attention."""
    found = [run for run in RUNS if run.half == "fitted" and (host == GRACE) == (GPUS[run.gpu].host == GRACE)]
    return [run for run in found if run.job.software.fused_attention]


def fit_host(host: Host, names: tuple[str, ...]) -> Host:
    """Least squares of the relative errors of the step, by coordinate descent."""
    runs = rows(host)
    tables = [schedule_of(run.job) for run in runs]

    def error(candidate: Host) -> float:
        total = 0.0
        for run, table in zip(runs, tables, strict=True):
            gpu = GPUS[run.gpu]
            gpu = replace(gpu, host=candidate.at(gpu.host.clock))
            seconds = (
                simulate(table, costs(run.job, gpu)).makespan
                + update(run.job, gpu, run.counts, table).seconds
            )
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
    for name, host, free in (
        ("grace", GRACE, ("kernel", "module", "unbound")),
        ("x86", X86, ("kernel", "module")),
    ):
        fitted = fit_host(host, free)
        print(
            f"{name}: {fitted.kernel * 1e6:.1f} us a kernel, {fitted.module * 1e6:.0f} us a module, "
            f"×{fitted.unbound:.2f} unbound "
            f"(table: {host.kernel * 1e6:.1f}, {host.module * 1e6:.0f}, {host.unbound:.2f})"
        )


if __name__ == "__main__":
    main()
