"""Train from Hydra's groups: they resolve to the ordinary arguments of `dsv3_megatron.train`, which does the
rest.

    torchrun --nproc-per-node 4 -m dsv3_megatron.train_hydra model=tiny layout=cpu_pp2_ep2 device=cpu
    train_iters=50

`--cfg command` prints the equivalent `torchrun … --spec dsv3 …` line, `--cfg job` the composed
configuration; neither trains. Hydra's launcher is not used: no output folder, no change of directory, no
logging of its own.
"""

import os
import sys
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from dsv3_megatron.conf import ConfigError, compose, groups, to_argv, to_command
from dsv3_megatron.errors import ends_in_one_line

SHOWN = ("command", "job")


def _report(error: Exception) -> str:
    from dsv3_megatron.train import report

    return report(error)


@ends_in_one_line(_report)
def main(words: Sequence[str] | None = None) -> None:
    """Compose the overrides in `words` (default: the command line), then train or print.

    Errors: RefusedArgument before anything is built.
    """
    show, overrides = _split_show(list(sys.argv[1:] if words is None else words))
    if show == "help":
        _print(_help())
    elif show is not None:
        cfg = compose(overrides)
        _print(to_command(cfg) if show == "command" else OmegaConf.to_yaml(cfg).rstrip())
    else:
        _train(compose(overrides, processes=int(os.environ.get("WORLD_SIZE", "1"))))


def _train(cfg: DictConfig) -> None:
    if cfg.get("device") == "cpu":
        _activate_cpu()
    argv = to_argv(cfg)
    from dsv3_megatron import train

    train.main(argv)


def _activate_cpu() -> None:
    """Before `to_argv` imports Megatron. With a GPU visible the trainer refuses, in its own words."""
    import torch

    from dsv3_megatron import cpu

    if not torch.cuda.is_available():
        cpu.activate()


def _split_show(words: list[str]) -> tuple[str | None, list[str]]:
    """What to print instead of training, if anything, and the overrides."""
    if "-h" in words or "--help" in words:
        return "help", []
    if "--cfg" not in words:
        return None, words
    at = words.index("--cfg")
    shown = words[at + 1] if at + 1 < len(words) else ""
    if shown not in SHOWN:
        raise ConfigError(f"--cfg {shown}: use --cfg {' or --cfg '.join(SHOWN)}")
    return shown, words[:at] + words[at + 2 :]


def _help() -> str:
    usage = ["usage: torchrun … -m dsv3_megatron.train_hydra [--cfg command|job] [NAME=VALUE ...]"]
    usage += [f"  {group}= {', '.join(options)}" for group, options in groups().items()]
    usage += ["and any argument of Megatron, with underscores: train_iters=50 no_rope_fusion=true"]
    return "\n".join(usage)


def _print(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text)


if __name__ == "__main__":
    main()
