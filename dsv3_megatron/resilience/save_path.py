"""Can checkpoints be written there? Asked before anything is built."""

import os
from pathlib import Path

from dsv3_megatron.errors import RefusedArgument

PROBE_BYTES = 1 << 20


def check(path: Path, rank: int = 0) -> None:
    """Write, sync and remove a file of 1 MiB in `path` (made if need be), as a save will.

    Args:
        rank: makes the file's name its own; the ranks of a job probe at the same time.

    Raises:
        RefusedArgument: names the folder and what the system answered (read-only, full, no permission, …).
    """
    probe = path / f".write-probe-{rank}-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(b"\0" * PROBE_BYTES)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise RefusedArgument(
            f"--save {path}: {error.strerror} ({type(error).__name__} while writing {PROBE_BYTES >> 20} MiB there). "
            "Use a folder that every node can write to, with room for a checkpoint"
        ) from error
