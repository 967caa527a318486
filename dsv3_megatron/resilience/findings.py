"""What is wrong with a step, and where it began: plain data and logic, no torch."""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

HISTORY = 100  # losses that a new one is compared with
FEWEST = 16  # below so many nothing is called a spike


@dataclass(frozen=True)
class Finding:
    """A bad value that one rank saw in one step.

    Attributes:
        kind: "output" (an activation that leaves a stage), "loss", "spike" or "gradient" (of the rank's parameters,
            before they are reduced: no microbatch).
        rank: of the job.
        stage: pipeline stage, counted from the embedding.
        column: which of the parallel pipelines; findings of different columns do not follow from each other.
        microbatch: of the pipeline, both directions of DualPipe counted together; None for gradients.
        value: mean loss per token, or NaN.
        limit: of a spike.
    """

    kind: str
    rank: int
    stage: int
    column: int
    microbatch: int | None
    value: float
    limit: float | None = None

    def __str__(self) -> str:
        where = f"rank {self.rank}, stage {self.stage}"
        if self.microbatch is not None:
            where += f", microbatch {self.microbatch}"
        match self.kind:
            case "spike":
                return f"loss {self.value:.4g} per token is above {self.limit:.4g} on {where}"
            case "loss":
                return f"loss is {self.value} on {where}"
            case "output":
                return f"the stage's output is not finite on {where}"
        return f"gradients are not finite on {where}, although all losses are"


def origins(findings: Iterable[Finding]) -> list[Finding]:
    """The findings from which the others follow.

    A bad output makes the outputs and losses of the stages behind it bad, and all gradients of the job. Of a microbatch
    that is bad the first stage counts; gradients count where no forward pass was bad.
    """
    first: dict[tuple[int, int | None], list[Finding]] = {}
    gradients = []
    for finding in findings:
        if finding.kind == "gradient":
            gradients.append(finding)
            continue
        group = first.setdefault((finding.column, finding.microbatch), [])
        if group and finding.stage < group[0].stage:
            group.clear()
        if not group or finding.stage == group[0].stage:
            group.append(finding)
    forward = sorted(
        (_plainest(group) for group in first.values()), key=lambda f: (f.microbatch or 0, f.column, f.rank)
    )
    return forward or sorted(gradients, key=lambda f: f.rank)


def _plainest(group: list[Finding]) -> Finding:
    """The last stage may report its output and its loss: the loss says more."""
    return max(group, key=lambda finding: finding.kind in ("loss", "spike"))


@dataclass
class SpikeDetector:
    """Calls a loss a spike that is `factor` times the median of the last 100, once 16 are known.

    Not saved in checkpoints: after a resume it learns anew.
    """

    factor: float
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))

    @property
    def limit(self) -> float | None:
        """The largest loss that is not a spike, None as long as too few are known."""
        return self.factor * statistics.median(self.losses) if len(self.losses) >= FEWEST else None

    def learn(self, losses: Iterable[float]) -> None:
        """Take up the losses of a good step."""
        self.losses.extend(losses)
