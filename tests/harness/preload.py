# ruff: noqa: E402 - the order of imports is the point here
"""Imported once by the fork server: everything that is slow to import, so that a rank starts in milliseconds."""

import os
import traceback

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also keeps the server free of threads, which fork would lose

from tests.harness.runtime import activate_runtime

activate_runtime()

import torch

torch.set_num_threads(1)

import megatron.core
import megatron.core.parallel_state
import megatron.training

try:
    # Megatron's tokenizers bring `transformers`, seconds in every rank that trains.
    import megatron.core.tokenizers.text  # noqa: F401

    import dsv3_megatron.resilience
    import dsv3_megatron.specs.select
    import dsv3_megatron.train
    import dsv3_megatron.training.step  # noqa: F401

    # The help texts that Megatron reads from its own sources are read here, once (the repair `field_docstrings`).
    from dsv3_megatron.arguments.command_line import megatron_parser

    megatron_parser()
except Exception:  # a broken module must fail the tests that use it, not the server
    traceback.print_exc()
