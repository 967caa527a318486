# ruff: noqa: E402, F401 - the order of imports is the point here
"""Imported once by the fork server: what is slow to import, so that each of a dozen runs starts in a second."""

from dsv3_megatron import cpu

cpu.activate()  # before anything imports Megatron

import torch

torch.set_num_threads(1)

import hydra
import matplotlib
import megatron.core
import megatron.core.tokenizers.text
import megatron.training

matplotlib.use("Agg")

import matplotlib.pyplot

import dsv3_megatron.checkpoint.recorded
import dsv3_megatron.conf
import dsv3_megatron.inference
import dsv3_megatron.resilience
import dsv3_megatron.specs.select
import dsv3_megatron.train
import dsv3_megatron.training.step
