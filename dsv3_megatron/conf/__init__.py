"""Hydra configuration that resolves to ordinary Megatron arguments.

`compose(overrides)` gives the checked configuration, `to_argv(cfg)` the argument list of
`dsv3_megatron.train`, `to_command(cfg)` the `torchrun` line that is its equal. The YAML groups lie beside
this file.
"""

from dsv3_megatron.conf.argv import to_argv, to_command
from dsv3_megatron.conf.compose import compose, groups, training_layouts
from dsv3_megatron.conf.errors import ConfigError

__all__ = ["ConfigError", "compose", "groups", "to_argv", "to_command", "training_layouts"]
