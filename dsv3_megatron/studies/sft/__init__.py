"""`make demo-sft`: the demo's model learns to write a function's signature from its docstring."""
