"""AdamW with bf16 moments, fp32 master weights and gradients, through Megatron's distributed optimizer.

Turned on by Megatron's own arguments: `--optimizer adam --use-distributed-optimizer
--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16` (master weights and gradients
are fp32 by default). docs/optimizer.md.
"""

from dsv3_megatron.optimizer.adamw import AdamW
from dsv3_megatron.optimizer.install import implementation, install

__all__ = ["AdamW", "implementation", "install"]
