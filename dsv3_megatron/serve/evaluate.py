"""`dsv3 evaluate`: benchmarks of a model on disk, through EleutherAI's lm-evaluation-harness.

    dsv3 evaluate --load runs/demo/checkpoints --device cpu --tasks dsv3_choice_en,dsv3_text_en --json
    dsv3 evaluate --hf DIR --tasks arc_easy hellaswag --num-fewshot 5 --output runs/eval
    torchrun --nproc-per-node 4 -m dsv3_megatron evaluate --tensor-model-parallel-size 2 …

With --output the same command goes on where it was interrupted, and samples and pictures are written. --list names the
tasks that come with this package; they need no network.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dsv3_megatron.errors import Parser, RefusedArgument, exits_cleanly
from dsv3_megatron.evaluation import catalog
from dsv3_megatron.evaluation.grading import Grader, by_endpoint, by_match
from dsv3_megatron.evaluation.setting import Setting, use
from dsv3_megatron.serve.load import loaded_model
from dsv3_megatron.serve.options import (
    add_engine_options,
    add_model_options,
    engine_settings,
    is_first_rank,
    layout_of,
    new_parser,
    open_model,
)
from dsv3_megatron.serve.source import Source

if TYPE_CHECKING:
    from dsv3_megatron.evaluation.scorer import Scorer

MATCH = "match"


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.list:
        print("\n".join(catalog.our_tasks()))
        return 0
    names = catalog.split_names(options.tasks)
    _check(options)
    catalog.check_names(names, options.include_path)
    _check_read(options, names)
    source = open_model(options)
    tokenizer_folder = source.need_tokenizer("dsv3 evaluate").folder
    from dsv3_megatron.evaluation.text import open_tokenizer

    tokenizer = open_tokenizer(tokenizer_folder)
    if options.apply_chat_template and not tokenizer.chat_template:
        raise RefusedArgument(
            f"--apply-chat-template: the tokenizer of {tokenizer_folder} has no chat template"
        )
    loaded = None
    if is_first_rank():
        use(_setting(options, tokenizer))
        with redirect_stdout(sys.stderr):  # what tasks print is no result
            loaded = catalog.load_tasks(names, options.include_path, download=options.download)
    try:
        with _scorer(options, source, tokenizer) as scorer:
            return _evaluate(options, source, tokenizer, loaded, scorer)
    except KeyboardInterrupt:
        goes_on = "the same command goes on" if options.output else "with --output DIR it could go on"
        print(f"interrupted: {goes_on}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("dsv3 evaluate", __doc__, Parser)
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="divided by commas or spaces")
    parser.add_argument("--list", action="store_true", help="name the tasks that come with this package")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--output", type=Path, metavar="DIR", help="answers, samples, results and pictures")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task, the first ones")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    tasks.add_argument(
        "--apply-chat-template", action="store_true", help="ask in the tokenizer's chat template"
    )
    tasks.add_argument(
        "--system-instruction", metavar="TEXT", help="first words of each prompt or conversation"
    )
    tasks.add_argument(
        "--include-path", type=Path, metavar="DIR", help="more tasks, as the harness's YAML files"
    )
    tasks.add_argument("--download", action="store_true", help="fetch data that is not on this machine")
    tasks.add_argument(
        "--bootstrap-iters",
        type=int,
        default=100_000,
        help="for standard errors (default: %(default)s, 0: none)",
    )
    tasks.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="allow tasks of the harness that run generated code outside the sandbox",
    )
    ours = parser.add_argument_group("tasks of this package")
    ours.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="what dsv3_text measures"
    )
    for what, text in (
        ("lengths", "tokens of dsv3_needle's haystacks"),
        ("depths", "percent before the needle"),
    ):
        ours.add_argument(f"--needle-{what}", type=int, nargs="+", default=[], metavar="N", help=text)
    ours.add_argument(
        "--grader",
        default=MATCH,
        metavar="match|URL",
        help="of dsv3_facts_*: equality after normalisation, or a chat model behind OpenAI's API at URL (…/v1), "
        "with the key in OPENAI_API_KEY (default: %(default)s)",
    )
    ours.add_argument("--grader-model", metavar="NAME", help="of --grader URL")
    add_model_options(parser)
    add_engine_options(parser, max_batch=32)
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("num_fewshot", 0), ("bootstrap_iters", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise RefusedArgument(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        raise RefusedArgument(f"--output {options.output}: is a file; name a folder")
    if options.speculative:
        raise RefusedArgument(
            f"--speculative {options.speculative}: log-likelihoods are computed without drafts; leave it out"
        )
    if options.grader != MATCH and not _is_address(options.grader):
        raise RefusedArgument(f"--grader {options.grader}: {MATCH}, or the URL of an endpoint (http://…/v1)")
    if (options.grader == MATCH) != (not options.grader_model):
        raise RefusedArgument("--grader URL and --grader-model NAME belong together: give both, or neither")


def _check_read(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Options of single tasks, where none of these tasks is asked for; other people's tasks may read any."""
    if options.include_path is not None:
        return
    needle = ("dsv3_needle", "dsv3_offline")
    facts = (
        "dsv3_facts_en",
        "dsv3_facts_zh",
        "dsv3_facts_en_repeated",
        "dsv3_facts_zh_repeated",
        "dsv3_offline",
    )
    for option, given, readers in (
        ("--text", options.text, ("dsv3_text",)),
        ("--needle-lengths", options.needle_lengths, needle),
        ("--needle-depths", options.needle_depths, needle),
        ("--grader", options.grader != MATCH, facts),
    ):
        if given and not set(readers) & set(names):
            raise RefusedArgument(f"{option}: none of --tasks reads it; add {readers[0]}, or leave it out")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of a bracket, or of a port
        return False
    return bool(named) and not any(map(str.isspace, url))


def _setting(options: argparse.Namespace, tokenizer: Any) -> Setting:
    return Setting(
        max_length=options.max_length,
        count=lambda text: len(tokenizer.encode(text)),
        texts=tuple(options.text),
        needle_lengths=tuple(options.needle_lengths),
        grader=_grader(options),
        **({"needle_depths": tuple(options.needle_depths)} if options.needle_depths else {}),
    )


def _grader(options: argparse.Namespace) -> Grader:
    if options.grader == MATCH:
        return by_match
    return by_endpoint(options.grader, options.grader_model, os.environ.get("OPENAI_API_KEY"))


@contextmanager
def _scorer(options: argparse.Namespace, source: Source, tokenizer: Any) -> Iterator["Scorer"]:
    with loaded_model(source, layout_of(options), options.dtype, options.transformer_impl) as model:
        from dsv3_megatron.evaluation.engine_scorer import EngineScorer
        from dsv3_megatron.inference import Engine

        max_length = options.max_length
        options.max_length = max_length + 1  # of a row that is scored, the last token is no input
        settings = engine_settings(options, source)
        options.max_length = max_length
        engine = Engine(model, settings, source.ends, tokenizer.decode)
        try:
            yield EngineScorer(engine, max_length)
        finally:
            engine.close()


def _evaluate(
    options: argparse.Namespace, source: Source, tokenizer: Any, loaded: Any, scorer: "Scorer"
) -> int:
    from dsv3_megatron.evaluation.ranks import follow, leading

    if not is_first_rank():
        follow(scorer)
        return 0
    from dsv3_megatron.evaluation.answers import Answers
    from dsv3_megatron.evaluation.model import HarnessModel
    from dsv3_megatron.evaluation.run import figures, num_samples, run, write

    answers = Answers(options.output, _settings(options, source))
    try:
        with leading(scorer) as leader, redirect_stdout(sys.stderr):
            results = run(
                HarnessModel(tokenizer, leader, answers),
                loaded,
                limit=options.limit,
                num_fewshot=options.num_fewshot,
                chat_template=options.apply_chat_template,
                system=options.system_instruction,
                bootstraps=options.bootstrap_iters,
                unsafe_code=options.confirm_run_unsafe_code,
            )
    finally:
        answers.close()
    found = figures(results)
    for task, values in found.items():
        for name, value in values.items():
            print(f"{task:<20} {name:<32} {'-' if value is None else f'{value:.4f}'}", file=sys.stderr)
    if options.output is not None:
        for file in write(results, options.output):
            print(f"wrote {file}", file=sys.stderr)
    if options.json:
        print(json.dumps({"results": found, "num_samples": num_samples(results)}))
    return 0


def _settings(options: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What answers depend on besides the question (layout and batch change nothing but the rounding)."""
    folder = (source.checkpoint or source.folder).resolve()
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(folder.iterdir())
        if file.is_file()
    ]
    digest = blake2b(repr(weights).encode(), digest_size=8).hexdigest()
    return {
        "model": str(folder),
        "files": digest,
        "dtype": options.dtype,
        "max_length": options.max_length,
    }


if __name__ == "__main__":
    sys.exit(main())
