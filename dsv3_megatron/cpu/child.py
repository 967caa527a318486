"""Imported by Python's fork server before it forks: its children have the CPU runtime before they import Megatron."""

from dsv3_megatron.cpu import activate

activate()
