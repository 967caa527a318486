# ruff: noqa: E402 - the order of imports is the point here
"""Imported once by the fork server: everything that is slow to import, so that a rank starts in milliseconds."""

import gc
import importlib
import os
import pkgutil
import traceback

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also keeps the server free of threads, which fork would lose

from tests.harness.runtime import activate_runtime

activate_runtime()

import torch

torch.set_num_threads(1)

import megatron.core
import megatron.core.datasets.gpt_dataset
import megatron.core.models.mimo
import megatron.core.parallel_state
import megatron.training

# The mock data is 100,000 documents otherwise, cut into samples and shuffled anew by each rank that trains.
megatron.core.datasets.gpt_dataset.MockGPTLowLevelDataset.size = 2000

# The folders whose modules a rank that trains imports as it starts.
FOLDERS = (
    "backends balance checkpoint data dispatch dualpipe ema expert_placement fp8 metrics optimizer posttrain"
)
FOLDERS += " recipe resilience sft training"
NEEDS_TE = {
    f"dsv3_megatron.{name}"
    for name in ("backends.te", "fp8.te_backend", "fp8.te_block_scaling", "fp8.te_mlp")
}


def import_folders() -> None:
    for folder in FOLDERS.split():
        package = importlib.import_module(f"dsv3_megatron.{folder}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name not in NEEDS_TE:
                importlib.import_module(module.name)


try:
    # Megatron's tokenizers bring `transformers`, seconds in every rank that trains.
    import megatron.core.tokenizers.text

    import dsv3_megatron.evaluation.live
    import dsv3_megatron.resilience
    import dsv3_megatron.specs.select
    import dsv3_megatron.train  # noqa: F401

    import_folders()

    from dsv3_megatron.arguments.command_line import megatron_parser

    megatron_parser()  # which reads the help texts of Megatron's arguments
except Exception:  # a broken module must fail the tests that use it, not the server
    traceback.print_exc()

# What is here now stays: no collection in a rank goes through it, nor copies its pages by touching them.
gc.collect()
gc.freeze()
