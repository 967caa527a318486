"""Megatron for commands that only build and count: no GPU, and no word about what is missing."""

import logging
import os
import warnings


def start_megatron() -> None:
    """Activate the CPU runtime, before anything imports Megatron."""
    # What Megatron misses (Apex, Transformer Engine, a GPU) is not needed here.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Nothing is computed, and one way for all machines: hide GPUs, stand in for CUDA.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from dsv3_megatron import cpu

    cpu.activate()
