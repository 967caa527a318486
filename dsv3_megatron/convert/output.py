"""An output folder that never looks complete before it is, and a conversion that goes on where it was interrupted.

An unfinished output NAME is `NAME.partial` beside it: `data/` becomes NAME at the end, `done/` has a small JSON record
of every part (a file of the output) that is on disk whole, with what the end of the conversion must know of it.
"""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dsv3_megatron.convert.errors import ConversionError

__all__ = ["WORKERS", "PartialOutput", "naming"]

WORKERS = 2  # by default: one file is brought to the disk while another is written


class PartialOutput:
    """The unfinished output of one conversion; a context manager that holds it against other processes.

    Args:
        output: the folder that will be there at the end; it must not exist, or be empty.
        job: what is converted and how; another run goes on only if it is the same.

    Attributes:
        data: where the files of the output are until then.

    Raises:
        ConversionError: the output exists, or an unfinished one of another conversion is in the way.
    """

    def __init__(self, output: Path, job: dict[str, Any]):
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.data, self._done = self.folder / "data", self.folder / "done"
        self._stopped = threading.Event()
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ConversionError(f"--output {output}: exists already; remove it or name another folder")
        with naming(self.folder):
            self._done.mkdir(parents=True, exist_ok=True)
            self.data.mkdir(exist_ok=True)
        self._lock()
        text, path = json.dumps(job, sort_keys=True), self.folder / "job.json"
        if not path.exists():
            path.write_text(text)
        if path.read_text() != text:
            raise ConversionError(
                f"{self.folder}: unfinished conversion of another input or with other options; finish that one, or "
                "remove the folder"
            )

    def _lock(self) -> None:
        self._lock_file = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConversionError(f"{self.folder}: another process is writing it") from error

    def __enter__(self) -> "PartialOutput":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock_file.close()

    def check_space(self, num_bytes: int) -> None:
        """Refuse to begin what cannot fit.

        Raises:
            ConversionError: fewer than `num_bytes` are free.
        """
        free = shutil.disk_usage(self.folder).free
        if num_bytes > free:
            raise ConversionError(
                f"--output {self.output}: {num_bytes / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free"
            )

    def record(self, part: str) -> Any:
        """What was recorded of a finished part, None if it is not finished."""
        try:
            return json.loads(self._record(part).read_text())
        except (OSError, ValueError):  # not there, or cut off by a crash of the machine
            return None

    def write_part(self, part: str, write: Callable[[BinaryIO], Any]) -> None:
        """Write a file `part` durably, then record what `write(file)` returns (JSON, not null)."""
        path = self.data / part
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
            try:
                value = write(file)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):  # closing writes what is left, and fails once more on a full disk
                    file.close()
                raise
            file.close()
            self._record(part).write_text(json.dumps(value))

    @contextmanager
    def tensor(self, part: str, name: str) -> Iterator[None]:
        """Around the writing of one tensor: an error names it; after another part's error it is given up."""
        if self._stopped.is_set():
            raise ConversionError("given up after another error")
        with naming(f"{self.data / part}: {name}"):
            yield

    def run(self, parts: list[str], do: Callable[[str], None], workers: int) -> None:
        """`do(part)` for every part that is not finished, by `workers` threads; the first error ends it."""
        waiting = [part for part in parts if self.record(part) is None]
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(do, part) for part in waiting]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._give_up(pool)
                raise
            failed = [future for future in done if future.exception()]
            if failed:
                self._give_up(pool)
        for future in failed:
            future.result()

    def _give_up(self, pool: ThreadPoolExecutor) -> None:
        self._stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)

    def finish(self) -> None:
        """Give the complete folder its name."""
        with naming(self.output):
            _sync_folder(self.data)
            if self.output.exists():
                self.output.rmdir()
            self.data.rename(self.output)
            _sync_folder(self.output.parent)
            shutil.rmtree(self.folder)

    def _record(self, part: str) -> Path:
        return self._done / f"{part.replace('/', '+')}.json"


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Turn an operating system's error inside into one that says what was being done."""
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{what}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
