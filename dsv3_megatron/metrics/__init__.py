"""Training metrics of DeepSeek-V3, on Megatron's log interval: console, TensorBoard, `metrics.jsonl`.

    metrics.install()   # before training; the trainer does it
    metrics.latest()    # the last logged step's figures, on every rank

docs/metrics.md lists them.
"""

from dsv3_megatron.metrics.install import install, latest

__all__ = ["install", "latest"]
