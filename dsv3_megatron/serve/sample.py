"""`dsv3 sample`: answers sampled from a model, kept where a reward says so (rejection sampling).

    dsv3 sample --load runs/demo/checkpoints --prompts problems.jsonl --samples 16 \\
        --reward answer=1,format=0.2 --filter 'reward>1' --output kept.jsonl

A line of the input is {"prompt": text or messages} with the "answer" that the reward needs (docs/rewards.md). A line
of the output is {"messages": [user, assistant], "prompt_id", "sample", "response", "reward", "parts", "answer"},
prompt by prompt; `dsv3 sft --ignore-key sample response reward parts answer` reads it. All samples, with the reward
of each, stand in OUTPUT.samples.jsonl and OUTPUT.rewards.jsonl: the same command again goes on there, and another
--filter costs no sampling.
"""

import argparse
import json
import math
import operator
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron import rewards
from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.files import write_whole
from dsv3_megatron.rewards.named import parts_of
from dsv3_megatron.serve.generate import answer_all, parser_of, settings_of
from dsv3_megatron.serve.options import (
    is_first_rank,
    open_model,
    sampling_of,
)
from dsv3_megatron.serve.output import Answers
from dsv3_megatron.serve.prompts import Prompt, read_prompts
from dsv3_megatron.serve.source import Source

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
PIECE = 256  # samples scored between two lines of progress and of the file


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.samples < 1:
        raise RefusedArgument(f"--samples {options.samples}: must be 1 or more")
    if options.samples > 1 and options.temperature == 0:
        raise RefusedArgument(
            f"--temperature 0 with --samples {options.samples}: all would be the same; raise it"
        )
    if options.reward_workers < 1:
        raise RefusedArgument(f"--reward-workers {options.reward_workers}: must be 1 or more")
    if not 0 < options.reward_timeout < math.inf:
        raise RefusedArgument(f"--reward-timeout {options.reward_timeout:g}: must be above 0, and finite")
    parts = [part.name for part in parts_of(options.reward)]
    keeps = [read_filter(text, parts) for text in options.filter or ["reward>0"]]
    scorer = None
    if is_first_rank():
        scorer = rewards.Scorer(
            options.reward, workers=options.reward_workers, timeout_s=options.reward_timeout
        )
    source = open_model(options)
    source.need_tokenizer("dsv3 sample")
    sampling = sampling_of(options, source)
    prompts = read_prompts(options.prompts, source, options.max_length, also=("answer",))
    given = [prompt.also.get("answer") for prompt in prompts]
    asked = [prompt for prompt in prompts for _ in range(options.samples)]
    answers = None
    if is_first_rank():
        file = options.output.with_name(options.output.name + ".samples.jsonl")
        settings = {**settings_of(options, source), "samples": options.samples}
        answers = Answers(file, asked, settings)
    try:
        answer_all(options, source, asked, sampling, answers)
        if scorer is None:
            return 0
        result = _keep(options, source, scorer, prompts, given, keeps)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    finally:
        if answers is not None:
            answers.close()
        if scorer is not None:
            scorer.close()
    print(
        f"{options.output}: {result['kept']} of {result['samples']} samples kept, for {result['prompts_kept']} of "
        f"{result['prompts']} prompts; mean reward {result['mean_reward']:.3f}",
        file=sys.stderr,
    )
    if options.json:
        print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("dsv3 sample", __doc__, max_new_tokens=1024)
    parser.add_argument("--samples", type=int, required=True, metavar="N", help="per prompt")
    parser.add_argument(
        "--reward", default="answer", help="name, module:function, or name=weight,… (default: %(default)s)"
    )
    parser.add_argument(
        "--filter",
        action="append",
        metavar="'reward>X'",
        help="what is kept: reward, or a part of it by its name, > >= < <= == != a number; all of several must hold "
        "(default: reward>0)",
    )
    parser.add_argument("--reward-workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--reward-timeout", type=float, default=30.0, metavar="S", help="of one sample (default: %(default)s)"
    )
    return parser


def read_filter(text: str, parts: Sequence[str]) -> Callable[[float, dict[str, float]], bool]:
    """A test of a reward and its parts.

    Args:
        text: for example `reward>0.5` or `format>=0.2`.
        parts: names of the reward's parts.

    Raises:
        RefusedArgument: it is not of this form, or names no part.
    """
    match = re.fullmatch(
        r"\s*(.+?)\s*(>=|<=|==|!=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*", text
    )
    if match is None:
        raise RefusedArgument(
            f"--filter {text!r}: give a name, a comparison and a number, as in 'reward>0.5'"
        )
    name, compare, bound = match[1], _COMPARISONS[match[2]], float(match[3])
    if name == "reward":
        return lambda value, _: compare(value, bound)
    if name not in parts:
        raise RefusedArgument(
            f"--filter {text!r}: no {name!r} there; it can be reward, or of {', '.join(parts)}"
        )
    only = len(parts) == 1  # a reward alone has no parts
    return lambda value, each: compare(value if only else each[name], bound)


def _keep(
    options: argparse.Namespace,
    source: Source,
    scorer: rewards.Scorer,
    prompts: list[Prompt],
    given: list[Any],
    keeps: list[Callable[[float, dict[str, float]], bool]],
) -> dict[str, Any]:
    """Score what is not scored yet, and write what is kept."""
    folder, name = options.output.parent, options.output.name
    with open(folder / f"{name}.samples.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    scored = _Scores(folder / f"{name}.rewards.jsonl", options.reward, given)
    begin = time.monotonic()
    first = len(scored.lines)
    for start in range(first, len(texts), PIECE):
        members = range(start, min(start + PIECE, len(texts)))
        questions = [_text(source, prompts[index // options.samples]) for index in members]
        answers = [given[index // options.samples] for index in members]
        scored.add(scorer.score(questions, [texts[index] for index in members], answers))
        done = members.stop - first
        left = (time.monotonic() - begin) / done * (len(texts) - members.stop)
        print(
            f"sample {members.stop} of {len(texts)} rewards, {left:.0f} s left", file=sys.stderr, flush=True
        )
    scored.close()
    kept = []
    for index, line in enumerate(scored.lines):
        if line["outcome"] == "ok" and all(keep(line["reward"], line["parts"]) for keep in keeps):
            prompt, text = index // options.samples, texts[index]
            asked = _messages(source, prompts[prompt])
            kept.append(
                {
                    "messages": [*asked, {"role": "assistant", "content": text}],
                    "prompt_id": prompt,
                    "sample": index % options.samples,
                    "response": text,
                    "reward": line["reward"],
                    "parts": line["parts"],
                    "answer": given[prompt],
                }
            )
    write_whole(options.output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    values = [line["reward"] for line in scored.lines]
    return {
        "prompts": len(prompts),
        "samples": len(values),
        "kept": len(kept),
        "prompts_kept": len({line["prompt_id"] for line in kept}),
        "mean_reward": sum(values) / len(values),
        "failed": sum(line["outcome"] != "ok" for line in scored.lines),
    }


def _is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt.given, list) and isinstance(prompt.given[0], dict)


def _messages(source: Source, prompt: Prompt) -> list[Any]:
    """The conversation that the kept answer ends; of its answers that one alone is learnt."""
    given: Any = prompt.given
    if not _is_chat(prompt):
        return [{"role": "user", "content": _text(source, prompt)}]
    return [{**item, "weight": 0} if item.get("role") == "assistant" else item for item in given]


def _text(source: Source, prompt: Prompt) -> str:
    """What the reward sees of a prompt; of messages their JSON, as in GRPO."""
    if isinstance(prompt.given, str):
        return prompt.given
    if _is_chat(prompt):
        return json.dumps(prompt.given, ensure_ascii=False)
    decode = source.decode
    assert decode is not None
    return decode(prompt.tokens)


class _Scores:
    """Rewards beside the samples, appended; those of an earlier run are kept where reward and answers are the same."""

    def __init__(self, file: Path, reward: str, given: list[Any]):
        head = {"scorer": reward, "answers": given}
        self.lines: list[dict[str, Any]] = []
        whole = b""
        if file.exists():
            content = file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            first, *rest = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]] or [None]
            if first == head:
                self.lines = rest
            else:
                whole = b""
        self._handle = open(file, "wb")  # noqa: SIM115 (closed by `close`)
        self._handle.write(whole or json.dumps(head).encode() + b"\n")
        self._handle.flush()

    def add(self, scores: list[rewards.Score]) -> None:
        for score in scores:
            line = {
                "reward": score.value,
                "outcome": score.outcome,
                "parts": score.parts,
                "detail": score.detail,
            }
            self.lines.append(line)
            self._handle.write(json.dumps(line).encode() + b"\n")
        self._handle.flush()

    def close(self) -> None:
        self._handle.close()


if __name__ == "__main__":
    sys.exit(main())
