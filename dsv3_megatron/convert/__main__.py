"""`python -m dsv3_megatron.convert hf-to-megatron | megatron-to-hf | verify | engines`."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.convert.output import WORKERS
from dsv3_megatron.errors import exits_cleanly

# Conversion is work for the CPU, also where there is a GPU. Before torch is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dsv3_megatron.convert", description=__doc__)
    commands = parser.add_subparsers(required=True)

    into = commands.add_parser("hf-to-megatron", help="Hugging Face directory to torch_dist checkpoint")
    _add_folders(into, "a Hugging Face directory", "folder for --load of the trainer")
    into.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp32"),
        default="keep",
        help="of the weights (default keep; FP8 becomes bf16)",
    )
    into.set_defaults(run=_hf_to_megatron)

    back = commands.add_parser("megatron-to-hf", help="torch_dist checkpoint to Hugging Face directory")
    _add_folders(back, "what --save of the trainer or hf-to-megatron wrote", "Hugging Face directory")
    back.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp32", "fp8"),
        default="keep",
        help="of the weights (default keep); fp8 as released, with weight_scale_inv",
    )
    back.add_argument("--hf-files", type=Path, help="take config.json and tokenizer files from this folder")
    back.add_argument("--shard-size", type=float, default=5e9, help="bytes per shard (default 5e9)")
    back.set_defaults(run=_megatron_to_hf)

    verify = commands.add_parser("verify", help="compare both sides, tensor by tensor, and their logits")
    verify.add_argument("--hf", type=Path, required=True)
    verify.add_argument("--megatron", type=Path, required=True)
    verify.add_argument("--json", action="store_true", help="one JSON object on the last line")
    verify.add_argument("--no-logits", action="store_true", help="compare the tensors only")
    verify.add_argument(
        "--prompt", action="append", help="text whose logits are compared (may be repeated; default: a few)"
    )
    verify.set_defaults(run=_verify)

    engines = commands.add_parser("engines", help="whether vLLM and SGLang would take every tensor")
    engines.add_argument("--hf", type=Path, required=True)
    engines.set_defaults(run=_engines)
    return parser


def _add_folders(parser: argparse.ArgumentParser, source: str, output: str) -> None:
    parser.add_argument("--input", type=Path, required=True, help=source)
    parser.add_argument("--output", type=Path, required=True, help=f"{output}; must not exist")
    parser.add_argument(
        "--workers",
        type=_positive,
        default=WORKERS,
        help="files written at the same time (default %(default)s)",
    )


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return int(text)


def _hf_to_megatron(options: argparse.Namespace) -> None:
    from dsv3_megatron.convert.to_megatron import hf_to_megatron

    arch = hf_to_megatron(options.input, options.output, options.dtype, options.workers)
    arguments = arch.arguments()
    print(f"# The model as arguments of dsv3_megatron.train:\n{command_line(arguments)}\n")
    print(f"# The model for Hydra, dsv3_megatron/conf/model/NAME.yaml:\n{hydra_model(arguments)}")


def _megatron_to_hf(options: argparse.Namespace) -> None:
    from dsv3_megatron.convert.to_hf import megatron_to_hf

    megatron_to_hf(
        options.input,
        options.output,
        options.dtype,
        options.hf_files,
        options.workers,
        int(options.shard_size),
    )


def _verify(options: argparse.Namespace) -> None:
    from dsv3_megatron.convert.verify import verify

    result = verify(options.hf, options.megatron, options.prompt, logits=not options.no_logits)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}: {value}")


def _engines(options: argparse.Namespace) -> None:
    from dsv3_megatron.convert.engines import ENGINES, load
    from dsv3_megatron.convert.errors import ConversionError
    from dsv3_megatron.convert.hf_directory import HFDirectory
    from dsv3_megatron.convert.safetensors_file import SafetensorsFile

    directory = HFDirectory(options.hf)
    # As they are in the files: some releases have experts together in one tensor, which not every engine takes apart.
    names = [
        name for file in sorted(options.hf.glob("*.safetensors")) for name in SafetensorsFile(file).entries
    ]
    scaled = any(name.endswith("weight_scale_inv") for name in names)
    for engine in ENGINES:
        found = load(engine, names, directory.architecture, scaled)
        if not found.complete:
            wrong = [*(f"{name}: no place for it" for name in found.left),
                     *(f"{name}: nothing fills it" for name in found.missing)]  # fmt: skip
            raise ConversionError(f"{options.hf}: {engine}: {wrong[0]} (of {len(wrong)})")
        print(
            f"{engine}: {found.consumed} tensors consumed, {len(found.unread)} taken from elsewhere, none left"
        )


def command_line(arguments: dict[str, Any]) -> str:
    """The arguments as words of a shell command; what is True is a flag."""
    words: list[str] = []
    for name, value in arguments.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def hydra_model(arguments: dict[str, Any]) -> str:
    """The arguments as a file of the Hydra group `model`."""
    lines = ["# @package _global_", "defaults:", "  - override /recipe: v3_pretrain", ""]
    return "\n".join([*lines, *(f"{name}: {_yaml(value)}" for name, value in arguments.items())])


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])
