"""How DeepSeek-V3 was trained (report §4): schedules by tokens, the batch ramp and what it needs of a layout.

Turned on by `--train-tokens`; the trainer calls `recipe.install.install`. docs/recipe.md.
"""
