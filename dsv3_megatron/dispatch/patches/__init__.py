"""What is replaced in Megatron for this feature: one module per symbol, see `dsv3_megatron.patching`."""
