"""What DPO and GRPO share in a run: hooks, reports, where files are kept."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.posttrain.journal import Journal
from dsv3_megatron.posttrain.reference import ReferenceWeights

__all__ = ["FOLDER", "Kept", "Run", "checkpoints", "repeated"]

FOLDER = "posttrain"  # in --save


class Run(ABC):
    """A post-training run on one rank; its methods are called by the trainer's hooks."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self._journal: Journal | None = None
        self._numbers: dict[str, float] = {}  # of this step, besides the loss function's
        self._alpha: float | None = None

    # --- what each method does

    @abstractmethod
    def after_load(self, call: dict[str, Any], iteration: int) -> None:
        """The checkpoint is loaded; `iteration` 0: the run begins."""

    @abstractmethod
    def before_step(self, call: dict[str, Any]) -> None:
        """Before a step: the reference, the rollouts, this step's data."""

    @abstractmethod
    def loss(self, batch: dict[str, Any], losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `training.step.add_loss`."""

    @abstractmethod
    def balance_scale(self) -> float:
        """What the loss is divided by, per token that the routers see.

        Routers weigh their balance loss by tokens, and Megatron divides all by what the loss function counts.
        """

    def replay(self, model: Any, batch: dict[str, Any]) -> AbstractContextManager[None]:
        """As `hooks.around_forward`; DPO has nothing to replay."""
        return nullcontext()

    # --- hooks

    def begin_step(self, call: dict[str, Any]) -> None:
        """As `hooks.before_step`."""
        self._numbers = {}
        self.before_step(call)
        self._set_alpha(call["model"])

    def before_update(self, call: dict[str, Any]) -> None:  # noqa: B027 - DPO has nothing to do there
        """As `hooks.before_update`."""

    def after_step(self, call: dict[str, Any], result: Any) -> None:
        """As `hooks.after_step`: the journal, where Megatron logs."""
        iteration = call["iteration"] + 1
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1 or self.args.save is None:
            return
        if self._journal is None:
            self._journal = Journal(Path(self.args.save), call["iteration"])
        losses = {name: float(value) for name, value in result[0].items()}
        more = {"skipped": float(result[1]), "grad norm": float(result[5] or 0.0)}
        self._journal.add(
            iteration, {**losses, **self._numbers, **more}, last=iteration == self.args.train_iters
        )

    # --- helpers

    def note(self, numbers: Mapping[str, float]) -> None:
        """Numbers of this step for the journal; the same on every rank."""
        self._numbers.update(numbers)

    def finish_loss(
        self, total: Tensor, count: Tensor, report: Mapping[str, tuple[Any, Any]]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss function's answer; each entry of `report` is a sum and what it is divided by, over all ranks."""
        from dsv3_megatron.training import hooks

        hooks.saw_loss(total, count)
        logged = {
            name: torch.stack([torch.as_tensor(part, device=total.device).detach().float() for part in parts])
            for name, parts in report.items()
        }
        return total, count, logged

    def say(self, text: str) -> None:
        """A line on rank 0."""
        from megatron.training import print_rank_0

        print_rank_0(f"> {self.args.posttrain}: {text}")

    def begin_reference(self, reference: ReferenceWeights, iteration: int) -> None:
        """Write the reference where the run begins; where it goes on, read the one that it had there."""
        if not iteration:
            if self.args.save is not None:
                self._kept_references(self.args.save).clear()  # of a run that was there before
            self.keep_reference(reference, 0)
            return
        kept = self._kept_references(self.args.save or self.args.load)
        # A later one is of a run that came further than the checkpoint from which this one goes on.
        reference.load(kept.file(max((i for i in kept.iterations() if i < iteration), default=0)))

    def keep_reference(self, reference: ReferenceWeights, iteration: int) -> None:
        """Write the reference that begins at this iteration."""
        if self.args.save is None:
            return
        kept = self._kept_references(self.args.save)
        reference.save(kept.file(iteration))
        began = kept.iterations()
        kept.keep(max((i for i in began if i < saved), default=0) for saved in checkpoints(self.args.save))

    @staticmethod
    def _kept_references(folder: str) -> "Kept":
        name = f"reference_{torch.distributed.get_rank()}_of_{torch.distributed.get_world_size()}"
        return Kept(Path(folder) / FOLDER, name)

    def first_weights(self) -> str:
        """Which weights the run began with: the checkpoint's place, step and date."""
        folder = self.args.pretrained_checkpoint
        if folder is None:
            return "initial"
        tracker = Path(folder).resolve() / "latest_checkpointed_iteration.txt"
        step = tracker.read_text().strip()
        found = hashlib.blake2b(digest_size=8)
        name = step if step == "release" else f"iter_{int(step):07d}"
        for file in sorted((tracker.parent / name).rglob("*")):
            if file.is_file():
                status = file.stat()
                found.update(f"{file.name}:{status.st_size}:{status.st_mtime_ns};".encode())
        return f"{tracker.parent}:{step}:{found.hexdigest()}"

    def _set_alpha(self, model: list[Any]) -> None:
        """Scale α so that the balance loss is a mean over tokens, whatever the main loss is a mean over."""
        configs = {
            id(c): c
            for chunk in model
            for m in chunk.modules()
            if (c := getattr(m, "config", None)) is not None
        }
        for config in configs.values():
            if not getattr(config, "moe_aux_loss_coeff", None):
                continue
            if self._alpha is None:
                self._alpha = config.moe_aux_loss_coeff
            config.moe_aux_loss_coeff = self._alpha * self.balance_scale()


class Kept:
    """Files of a run that a checkpoint needs beside it, one for each iteration at which such a thing began."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def file(self, iteration: int) -> Path:
        """Of the thing that began at this iteration."""
        return self.folder / f"{self.name}_from_{iteration}.pt"

    def iterations(self) -> list[int]:
        """Of the files that are there."""
        found = (file.stem.rpartition("_from_") for file in self.folder.glob(f"{self.name}_from_*.pt"))
        return sorted(int(number) for name, _, number in found if name == self.name and number.isdecimal())

    def clear(self) -> None:
        """Remove all."""
        for iteration in self.iterations():
            self.file(iteration).unlink()

    def keep(self, needed: Iterable[int]) -> None:
        """Remove all but these and the newest two, which a checkpoint that is being written may need."""
        there = self.iterations()
        for iteration in set(there[:-2]) - set(needed):
            self.file(iteration).unlink(missing_ok=True)


def checkpoints(folder: str) -> list[int]:
    """Iterations of the checkpoints in `--save`."""
    names = (path.name.removeprefix("iter_") for path in Path(folder).glob("iter_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def repeated(batches: list[dict[str, Tensor]] | None, like: Any) -> Any:
    """Iterators over these microbatches, one for each chunk, as Megatron's step takes them."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    def one() -> Any:
        return None if batches is None else RerunDataIterator(iter([dict(batch) for batch in batches]))

    return [one() for _ in like] if isinstance(like, list) else one()
