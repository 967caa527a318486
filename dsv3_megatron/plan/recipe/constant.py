"""A recipe of fixed length and batch: the long-context phases, and what has Megatron's own learning rate."""

import math
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.errors import ConfigError


@dataclass(frozen=True)
class ConstantSchedules:
    """Constant batch, γ and λ over a number of steps; the learning rate is constant or one cosine.

    Attributes:
        steps: of the run.
        warmup_share: part of the run in which the learning rate rises from 0.
    """

    steps: int
    seq_length: int
    batch_size: int
    lr: float
    min_lr: float
    cosine: bool
    warmup_share: float
    gamma: float
    mtp_weight: float

    @classmethod
    def from_config(cls, cfg: Any) -> "ConstantSchedules":
        """From a composed configuration; ConfigError for a learning rate of another course."""
        style = cfg.get("lr_decay_style", "linear")
        if style not in ("constant", "cosine"):
            raise ConfigError(
                f"lr_decay_style={style}: only constant, cosine and train_tokens' own can be shown"
            )
        steps = cfg.train_iters
        warmup = cfg.get("lr_warmup_fraction") or (cfg.get("lr_warmup_iters") or 0) / steps
        return cls(
            steps=steps,
            seq_length=cfg.seq_length,
            batch_size=cfg.global_batch_size,
            lr=cfg.lr,
            min_lr=cfg.get("min_lr") or 0.0,
            cosine=style == "cosine",
            warmup_share=warmup,
            gamma=cfg.moe_router_bias_update_rate,
            mtp_weight=cfg.mtp_loss_scaling_factor,
        )

    @property
    def num_samples(self) -> int:
        """Samples of the whole run."""
        return self.steps * self.batch_size

    def borders(self) -> dict[str, int]:
        """Samples at which something changes its course, by name."""
        return {"start": 0, "end": self.num_samples}

    def lr_at(self, samples: int) -> float:
        """Learning rate of the step that begins after `samples`."""
        share = samples / self.num_samples
        if share < self.warmup_share:
            return self.lr * share / self.warmup_share
        if not self.cosine:
            return self.lr
        course = (share - self.warmup_share) / (1 - self.warmup_share)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * course)) / 2

    def at(self, tokens: float) -> dict[str, Any]:
        """As `Schedules.at`."""
        return {
            "tokens": int(tokens),
            "lr": self.lr_at(int(tokens) // self.seq_length),
            "batch": self.batch_size,
            "gamma": self.gamma,
            "mtp_weight": self.mtp_weight,
        }
