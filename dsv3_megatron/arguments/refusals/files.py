"""Files and folders that options name: are they there, before anything is built on them?"""

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.surroundings import Surroundings

DATA, LOGS, SAVING = "Data", "Logs", "Checkpoints"
SPLITS = ("train", "valid", "test")
# Arguments that name a file to be read.
READ = (
    "data_args_path",
    "per_split_data_args_path",
    "per_dataset_sequences_path",
    "vocab_file",
    "merge_file",
    "metadata_path",
    "te_precision_config_file",
    "tp_comm_overlap_cfg",
    "nccl_communicator_config_path",
)
_OPTIONS = {"metadata_path": "--tokenizer-metadata"}
RESILIENCY = "nvidia_resiliency_ext"


def _missing_files(a: Namespace, s: Surroundings) -> list[str]:
    if not s.files_here:
        return []
    given = [(name, getattr(a, name)) for name in READ if getattr(a, name) is not None]
    return [
        f"{_OPTIONS.get(name, '--' + name.replace('_', '-'))} {value}"
        for name, value in given
        if not Path(value).is_file()
    ]


def _lists(a: Namespace) -> Iterator[list[str]]:
    """What each data option lists: `PREFIX`, or `WEIGHT PREFIX …`; ValueError for a file that cannot be read."""
    options = (a.data_path, a.train_data_path, a.valid_data_path, a.test_data_path)
    yield from (words for words in options if words)
    if a.data_args_path is not None:
        yield Path(a.data_args_path).read_text().split()
    if a.per_split_data_args_path is not None:
        table = json.loads(Path(a.per_split_data_args_path).read_text())
        for split in SPLITS:
            words = table[split]
            if words:
                yield words.split() if isinstance(words, str) else [str(word) for word in words]


def _prefixes(words: list[str]) -> list[str]:
    """The prefixes of one list, as Megatron reads it: an even number of words are weights and prefixes."""
    if len(words) == 1:
        return words
    weighted = len(words) % 2 == 0 and all(_is_number(word) for word in words[::2])
    return words[1::2] if weighted else words


def _is_number(word: str) -> bool:
    return re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", word) is not None


def _data_problem(a: Namespace, s: Surroundings) -> str:
    """What is wrong with the data that is named, "" when nothing."""
    if not s.files_here or a.mock_data or _missing_files(a, s):
        return ""
    try:
        lists = list(_lists(a))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its list cannot be read ({type(error).__name__}: {error})"
    for words in lists:
        for prefix in _prefixes(words):
            if "://" in prefix:  # object storage, see --object-storage-cache-path
                continue
            for ending in (".idx", ".bin"):
                if not Path(prefix + ending).is_file():
                    return f"{prefix}{ending} is not there"
    return ""


def _split_problem(a: Namespace) -> str:
    if a.split is None:
        return ""
    parts = a.split.split(",")
    good = len(parts) <= len(SPLITS) and all(re.fullmatch(r"\s*\d*\.?\d+\s*", part) for part in parts)
    return "" if good and sum(map(float, parts)) > 0 else "up to three numbers, not all 0, e.g. 969,30,1"


def _tokenizer_folder(a: Namespace, s: Surroundings) -> str:
    """What is wrong with the folder or file of the tokenizer."""
    path = a.tokenizer_model
    if path is None or not s.files_here or a.tokenizer_type in ("NullTokenizer", "NullMultimodalTokenizer"):
        return ""
    if Path(path).exists():
        has = any(
            (Path(path) / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        )
        if a.tokenizer_type == "HuggingFaceTokenizer" and not has:
            return "holds no tokenizer.json"
        return ""
    if a.tokenizer_type == "HuggingFaceTokenizer" and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return (
            "" if _is_cached(path) else "is not on this machine, and not in the cache of the Hugging Face hub"
        )
    return "is not on this machine"


def _is_cached(name: str) -> bool:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    files = ("tokenizer_config.json", "tokenizer.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def _needs_resiliency(a: Namespace) -> bool:
    return (
        a.enable_ft_package
        or a.non_persistent_ckpt_type == "local"
        or (a.async_save and a.async_strategy == "nvrx")
    )


ROWS = (
    Refusal(
        "file_missing",
        DATA,
        "--data-args-path / --per-split-data-args-path / --vocab-file / …",
        "",
        lambda a, s: bool(_missing_files(a, s)),
        "a file that is to be read is not there",
        "the path of a file on every node",
        "--data-args-path nowhere",
        without="--mock-data",
        detail=lambda a, s: ", ".join(_missing_files(a, s)),
    ),
    Refusal(
        "data_missing",
        DATA,
        "--data-path / --train-data-path / --valid-data-path / --test-data-path",
        "",
        lambda a, s: bool(_data_problem(a, s)),
        "the data cannot be read",
        "prefixes of .bin and .idx files, as written by python -m dsv3_megatron.data.prepare",
        "--data-path nowhere --tokenizer-type NullTokenizer",
        without="--mock-data",
        detail=_data_problem,
    ),
    Refusal(
        "split_form",
        DATA,
        "--split",
        "{split}",
        lambda a, s: bool(_split_problem(a)),
        "is not how the data is divided",
        "shares of training, validation and test",
        "--split most",
        detail=lambda a, s: _split_problem(a),
    ),
    Refusal(
        "split_twice",
        DATA,
        "--split",
        "{split}",
        lambda a, s: (
            a.split is not None
            and any(
                x is not None
                for x in (a.train_data_path, a.valid_data_path, a.test_data_path, a.per_split_data_args_path)
            )
        ),
        "each split has data of its own",
        "one of the two: --split with --data-path, or --train-data-path and --valid-data-path",
        "--split 9,1 --train-data-path nowhere",
    ),
    Refusal(
        "data_twice",
        DATA,
        "--data-path",
        "",
        lambda a, s: _num_sources(a) > 1,
        "the data is given more than once",
        "one of --mock-data, --data-path (--data-args-path), --train-data-path … (--per-split-data-args-path)",
        "--data-path nowhere",
    ),
    Refusal(
        "tokenizer_missing",
        DATA,
        "--tokenizer-model",
        "{tokenizer_model}",
        lambda a, s: bool(_tokenizer_folder(a, s)),
        "there is no tokenizer to read",
        "a folder with tokenizer.json, as written by python -m dsv3_megatron.data.prepare",
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model nowhere",
        detail=_tokenizer_folder,
    ),
    Refusal(
        "tokenizer_unknown",
        DATA,
        "--tokenizer-type",
        "{tokenizer_type}",
        lambda a, s: a.tokenizer_type in ("MultimodalTokenizer", "NullMultimodalTokenizer", "SFTTokenizer"),
        "is made for other models or data",
        "HuggingFaceTokenizer, or NullTokenizer for --mock-data",
        "--tokenizer-type MultimodalTokenizer",
    ),
    Refusal(
        "fast_cache",
        DATA,
        "--dataloader-fast-cache-load / --dataloader-defer-npy-index-mmap",
        "",
        lambda a, s: (
            (a.dataloader_fast_cache_load or a.dataloader_defer_npy_index_mmap) and a.data_cache_path is None
        ),
        "reads a cache of the data sets' indices",
        "--data-cache-path as well",
        "--dataloader-fast-cache-load",
    ),
    Refusal(
        "external_loader",
        DATA,
        "--dataloader-type",
        "{dataloader_type}",
        lambda a, s: a.dataloader_type == "external",
        "is for programs that bring their own data loader",
        "single, the default, or cyclic",
        "--dataloader-type external",
    ),
    Refusal(
        "save_without_interval",
        SAVING,
        "--save",
        "{save}",
        lambda a, s: a.save is not None and not a.save_interval,
        "nothing says how often",
        "--save-interval STEPS as well",
        "--save runs/x",
    ),
    Refusal(
        "retain_interval",
        SAVING,
        "--save-retain-interval",
        "{save_retain_interval}",
        lambda a, s: bool(
            a.save_retain_interval and a.save_interval and a.save_retain_interval % a.save_interval
        ),
        "is no multiple of --save-interval {save_interval}",
        "a multiple of it",
        "--save runs/x --save-interval 2 --save-retain-interval 3",
    ),
    Refusal(
        "params_while_gathering",
        SAVING,
        "--save-params-interval",
        "{save_params_interval}",
        lambda a, s: a.save_params_interval is not None and a.overlap_param_gather,
        "the weights are not all there between steps with --overlap-param-gather",
        "it without --overlap-param-gather",
        "--save runs/x --save-interval 1 --save-params-interval 1 --overlap-param-gather --overlap-grad-reduce "
        "--use-distributed-optimizer",
    ),
    Refusal(
        "tensors_of_te_modules",
        SAVING,
        "--save-activations-interval / --save-dgrads-interval / --save-tokens-per-expert-interval",
        "",
        lambda a, s: (
            a.transformer_impl != "transformer_engine"
            and bool(
                a.save_activations_interval or a.save_dgrads_interval or a.save_tokens_per_expert_interval
            )
        ),
        "Megatron takes these tensors from Transformer Engine's modules",
        "--transformer-impl transformer_engine, or --save-params-interval and --save-wgrads-interval",
        "--transformer-impl local --save runs/x --save-interval 1 --save-dgrads-interval 1",
    ),
    Refusal(
        "checkpoint_format",
        SAVING,
        "--ckpt-format",
        "{ckpt_format}",
        lambda a, s: a.ckpt_format in ("torch_dcp", "fsdp_dtensor"),
        "is the format of parameters sharded by FSDP",
        "torch_dist, the default",
        "--ckpt-format torch_dcp",
    ),
    Refusal(
        "convert_format",
        SAVING,
        "--ckpt-convert-format",
        "{ckpt_convert_format}",
        lambda a, s: a.ckpt_convert_format is not None and (a.ckpt_convert_save is None or a.load is None),
        "a checkpoint is read from --load and written to --ckpt-convert-save",
        "both as well",
        "--ckpt-convert-format torch",
    ),
    Refusal(
        "in_memory_checkpoints",
        SAVING,
        "--non-persistent-ckpt-type",
        "{non_persistent_ckpt_type}",
        lambda a, s: a.non_persistent_ckpt_type == "in_memory",
        "Megatron 0.19 has not written it",
        "global",
        "--non-persistent-ckpt-type in_memory",
    ),
    Refusal(
        "local_checkpoint_folder",
        SAVING,
        "--non-persistent-ckpt-type",
        "{non_persistent_ckpt_type}",
        lambda a, s: a.non_persistent_ckpt_type == "local" and a.non_persistent_local_ckpt_dir is None,
        "nothing says where on the nodes",
        "--non-persistent-local-ckpt-dir DIR as well",
        "--non-persistent-ckpt-type local",
    ),
    Refusal(
        "resiliency_package",
        SAVING,
        "--enable-ft-package / --non-persistent-ckpt-type local / --async-strategy nvrx",
        "",
        lambda a, s: _needs_resiliency(a) and RESILIENCY in s.missing,
        f"NVIDIA's {RESILIENCY} is not installed",
        "pip install nvidia-resiliency-ext, or --async-strategy mcore for background saves",
        "--enable-ft-package",
        Surroundings(world_size=8, missing=frozenset({RESILIENCY})),
    ),
    Refusal(
        "wandb_folder",
        LOGS,
        "--wandb-project",
        "{wandb_project}",
        lambda a, s: bool(a.wandb_project) and (not a.wandb_exp_name or not (a.save or a.wandb_save_dir)),
        "Weights & Biases needs a name for the run and a folder",
        "--wandb-exp-name NAME, and --save or --wandb-save-dir",
        "--wandb-project dsv3",
    ),
    Refusal(
        "wandb_package",
        LOGS,
        "--wandb-project",
        "{wandb_project}",
        lambda a, s: bool(a.wandb_project) and "wandb" in s.missing,
        "the package wandb is not installed",
        "pip install wandb, or leave it out; --tensorboard-dir writes the same",
        "--wandb-project dsv3",
        Surroundings(world_size=8, missing=frozenset({"wandb"})),
    ),
    Refusal(
        "memory_log",
        LOGS,
        "--log-memory-interval",
        "{log_memory_interval}",
        lambda a, s: a.log_memory_interval is not None and a.log_memory_interval % a.log_interval != 0,
        "is no multiple of --log-interval {log_interval}",
        "a multiple of it",
        "--log-memory-interval 3 --log-interval 2",
    ),
)


def _num_sources(a: Namespace) -> int:
    whole = a.data_path is not None or a.data_args_path is not None
    split = any(
        x is not None
        for x in (a.train_data_path, a.valid_data_path, a.test_data_path, a.per_split_data_args_path)
    )
    both = (a.data_path is not None and a.data_args_path is not None) or (
        a.per_split_data_args_path is not None
        and any(x is not None for x in (a.train_data_path, a.valid_data_path, a.test_data_path))
    )
    return a.mock_data + whole + split + both
