"""Megatron's scheduler of learning rate and weight decay, with DeepSeek-V3's fifth phase."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


class FivePhaseScheduler(OptimizerParamScheduler):
    """Warm-up, constant, cosine and constant are Megatron's WSD; from `last_phase` on the rate is `last_lr`.

    Attributes:
        last_phase: samples before the last phase.
        last_lr: its learning rate.
    """

    last_phase: int
    last_lr: float

    @classmethod
    def extend(
        cls, scheduler: OptimizerParamScheduler, last_phase: int, last_lr: float
    ) -> "FivePhaseScheduler":
        """The scheduler that Megatron has built from its arguments, with a last phase after it."""
        extended = cls.__new__(cls)  # its constructor would build what is there already
        extended.__dict__ = {**vars(scheduler), "last_phase": last_phase, "last_lr": last_lr}
        return extended

    def get_lr(self, param_group: dict) -> float:
        """Learning rate of a group after `num_steps` samples."""
        if self.num_steps >= self.last_phase:
            return self.last_lr
        return super().get_lr(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Megatron's state with the last phase."""
        return {**super().state_dict(), "last_phase": self.last_phase, "last_lr": self.last_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Megatron's load; a checkpoint of another schedule is an error unless Megatron's options allow it."""
        # Before the base class, which sets the learning rates.
        for name in ("last_phase", "last_lr"):
            value = getattr(self, name)
            setattr(self, name, self._check_and_set(value, state_dict.get(name, value), name))
        super().load_state_dict(state_dict)
