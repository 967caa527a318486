"""Start the processes of a shrunk run, and read what they wrote down."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Recorded", "RunFailed", "gradients", "launch", "run"]

RECORDER = Path(__file__).with_name("recorder.py")
TIME_S = 1200.0
_RANK = re.compile(r"^\[rank\d+\]: *")  # torch puts it before what a rank dies of
_LETTER = re.compile(r"[^\W\d_]")


class RunFailed(RuntimeError):
    """A run ended with an error; the text is its last words, one line."""


@dataclass(frozen=True)
class Recorded:
    """A run.

    Attributes:
        steps: each step's losses by name, "grad_norm" and "skipped", as the rank with the loss has them.
        folder: where the ranks wrote.
        loaded: packages that came from `first_on_path`.
    """

    steps: list[dict[str, Any]]
    folder: Path
    loaded: tuple[str, ...] = ()

    def finite(self) -> bool:
        """Whether no loss or norm is NaN or infinite, and no step was skipped."""
        return all(
            row["skipped"] == 0 and all(value is None or math.isfinite(value) for value in row.values())
            for row in self.steps
        )


def run(
    name: str,
    words: Sequence[str],
    world_size: int,
    folder: Path,
    gradients: bool = False,
    spoil: str = "",
    first_on_path: Path | None = None,
) -> Recorded:
    """Run the trainer on `world_size` processes, with a line of progress on stderr.

    Args:
        name: for people, and for the folder inside `folder`.
        words: of `dsv3_megatron.train`.
        gradients: keep those of the first step.
        spoil: a planted fault, for controls.
        first_on_path: folder of packages that stand before this environment's.

    Raises:
        RunFailed: the run ended with an error.
    """
    output = folder / name.replace(" ", "-")
    output.mkdir(parents=True)
    job = {"words": list(words), "output": str(output), "gradients": gradients, "spoil": spoil}
    job["site"] = str(first_on_path or "")
    begin = time.monotonic()
    print(f"prove: {name}: {world_size} process{'es' * (world_size > 1)} …", file=sys.stderr, flush=True)
    try:
        launch(job, world_size, first_on_path)
    except RunFailed as error:
        raise RunFailed(f"{name}: {error}") from None
    ranks = [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    steps = max((rank["steps"] for rank in ranks), key=lambda rows: len(rows[0]) if rows else 0)
    print(
        f"prove: {name}: {len(steps)} steps in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True
    )
    return Recorded(steps, output, tuple(ranks[0]["loaded"]))


def launch(job: dict[str, Any], world_size: int, first_on_path: Path | None = None) -> None:
    """Run a job's ranks under torchrun; their words go to a file `log` in its output folder.

    Raises:
        RunFailed: they ended with an error, or took too long.
    """
    output = Path(job["output"])
    file = output / "job.json"
    file.write_text(json.dumps(job))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size),
        str(RECORDER), str(file),
    ]  # fmt: skip
    places = [first_on_path or "", *sys.path]
    paths = os.pathsep.join(os.path.abspath(place) for place in places if place and os.path.isdir(place))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with open(output / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True, cwd=output
        )
        try:
            status = process.wait(TIME_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    if status is None:
        raise RunFailed(f"not done after {TIME_S:.0f} s")
    if status:
        raise RunFailed(_last_words(output / "log"))


def gradients(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Gradients of the first step by global name, shards joined; and the number of copies that were compared.

    Raises:
        RunFailed: copies of a gradient on several ranks differ.
    """
    import torch

    from dsv3_megatron.specs.names import Shard

    found: dict[str, dict[int, Tensor]] = {}
    shards: dict[str, Shard] = {}
    copies = 0
    for file in sorted(folder.glob("gradients-*.pt")):
        for name, (shard, value) in torch.load(file).items():
            shards[name] = Shard(*shard)
            parts = found.setdefault(name, {})
            if shards[name].index in parts:
                copies += 1
                if not torch.equal(parts[shards[name].index], value):
                    raise RunFailed(f"{name}: its gradient differs between the ranks that hold it")
            parts[shards[name].index] = value
    for name, parts in found.items():
        if len(parts) != shards[name].count:
            raise RunFailed(
                f"{name}: the ranks hold parts {sorted(parts)} of {shards[name].count} of its gradient"
            )
    return {
        name: Shard.join([parts[index] for index in sorted(parts)], shards[name])
        for name, parts in found.items()
    }, copies


def _last_words(log: Path) -> str:
    """The line of an error in a log."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")]
    if told:
        return told[0].removeprefix("error: ")
    lines = [_RANK.sub("", line) for line in lines]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Refused", "RefusedArgument"))]
    errors = [line for line in errors if "ChildFailedError" not in line]
    killed = [line.removeprefix("traceback : ") for line in lines if "received by PID" in line]
    return (errors or killed or [line for line in lines if _LETTER.search(line)] or ["no output"])[-1][:500]
