"""Imported by Python's fork server before it forks, so that its children have the CPU runtime."""

from dsv3_megatron.cpu import activate

activate()
