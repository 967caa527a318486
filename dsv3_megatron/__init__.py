"""DeepSeek-V3-class training for Megatron-LM: specs, DualPipe, fine-grained FP8.

Importing this package imports neither torch nor Megatron, so that `dsv3_megatron.cpu` can prepare both first.
"""

__version__ = "0.1.0"

from dsv3_megatron import moved

moved.install()
