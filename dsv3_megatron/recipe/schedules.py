"""Learning rate, batch size, bias update rate γ and MTP weight λ as functions of the tokens trained (report §4.2).

All borders are shares of the budget: `published tokens / 14.8T`, in whole samples, rounded down. A value holds for the
step that begins after so many samples, as in Megatron.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dsv3_megatron.recipe.ramp import BatchRamp

B = 10**9
PUBLISHED_TOKENS = 14_800 * B
PUBLISHED_SEQ_LENGTH = 4096
# Borders of the published run, in tokens.
RAMP_END = 469 * B
WARMUP_END = 2000 * 3072 * PUBLISHED_SEQ_LENGTH  # 2000 steps: all of them at the first batch size
CONSTANT_END = 10_000 * B
COSINE_END = 14_300 * B
LAST_PHASE = COSINE_END + 333 * B  # the last 167B tokens follow
GAMMA_END = 14_300 * B
MTP_BORDER = 10_000 * B
# Published values at the peak learning rate of 2.2e-4.
LR, MIN_LR, LAST_LR = 2.2e-4, 2.2e-5, 7.3e-6
GAMMA, MTP_WEIGHT, LATE_MTP_WEIGHT = 1e-3, 0.3, 0.1
BATCH_SIZE, BATCH_START = 15360, 3072
# Unpublished: 17 batch sizes, each a multiple of 256 (DualPipe's replicas in the published layout), the first one
# lasting for 29.3B tokens, so longer than the learning rate's warm-up.
BATCH_INCREMENT = 768


@dataclass(frozen=True)
class Schedules:
    """DeepSeek-V3's schedules over a budget of `train_tokens`.

    Attributes:
        train_tokens: budget; every border scales with it.
        seq_length: tokens per sample.
        lr, min_lr, last_lr: peak, end of the cosine, and constant of the last phase.
        batch_size: sequences per step at the end of the ramp.
        batch_ramp: first batch size and increment; None for a constant batch.
        gamma: bias update rate until GAMMA_END; 0 after it.
        mtp_weight: weight of the MTP loss until MTP_BORDER; at most LATE_MTP_WEIGHT after it.
    """

    train_tokens: int = PUBLISHED_TOKENS
    seq_length: int = PUBLISHED_SEQ_LENGTH
    lr: float = LR
    min_lr: float = MIN_LR
    last_lr: float = LAST_LR
    batch_size: int = BATCH_SIZE
    batch_ramp: tuple[int, int] | None = (BATCH_START, BATCH_INCREMENT)
    gamma: float = GAMMA
    mtp_weight: float = MTP_WEIGHT

    @property
    def num_samples(self) -> int:
        """Samples of the whole run."""
        return self.samples(PUBLISHED_TOKENS)

    def samples(self, published_tokens: int) -> int:
        """A border of the published run as samples of this one."""
        return published_tokens * self.train_tokens // (PUBLISHED_TOKENS * self.seq_length)

    @cached_property
    def ramp(self) -> BatchRamp:
        """The batch size; ValueError for a ramp that does not fit."""
        if self.batch_ramp is None:
            return BatchRamp((0,), (self.batch_size,))
        start, increment = self.batch_ramp
        return BatchRamp.linear(start, self.batch_size, increment, self.samples(RAMP_END))

    def lr_at(self, samples: int) -> float:
        """Learning rate: linear from 0, constant, cosine, and two constants."""
        warmup, constant, cosine = map(self.samples, (WARMUP_END, CONSTANT_END, COSINE_END))
        if samples < warmup:
            return self.lr * samples / warmup
        if samples <= constant:
            return self.lr
        if samples < cosine:
            share = (samples - constant) / (cosine - constant)
            return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * share)) / 2
        return self.min_lr if samples < self.samples(LAST_PHASE) else self.last_lr

    def gamma_at(self, samples: int) -> float:
        """Bias update rate γ."""
        return self.gamma if samples < self.samples(GAMMA_END) else 0.0

    def mtp_weight_at(self, samples: int) -> float:
        """MTP loss weight λ."""
        late = min(self.mtp_weight, LATE_MTP_WEIGHT)
        return self.mtp_weight if samples < self.samples(MTP_BORDER) else late

    def at(self, tokens: float) -> dict[str, Any]:
        """All values for the step that begins after `tokens`: keys tokens, lr, batch, gamma, mtp_weight."""
        samples = int(tokens) // self.seq_length
        return {
            "tokens": int(tokens),
            "lr": self.lr_at(samples),
            "batch": self.ramp.batch_size(samples),
            "gamma": self.gamma_at(samples),
            "mtp_weight": self.mtp_weight_at(samples),
        }

    def borders(self) -> dict[str, int]:
        """Samples at which something changes its course, by name, in order."""
        return {
            "start": 0,
            "learning rate at its peak": self.samples(WARMUP_END),
            "batch at its full size": self.ramp.thresholds[-1],
            "cosine begins, MTP weight falls": self.samples(CONSTANT_END),
            "cosine ends, bias stands still": self.samples(COSINE_END),
            "last learning rate": self.samples(LAST_PHASE),
            "end": self.num_samples,
        }
