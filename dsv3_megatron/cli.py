"""`dsv3 <verb>`: one command for everything that people start; `python -m dsv3_megatron` does the same.

A verb is the `main` of a module, which is imported only when the verb is called.
"""

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Verb(NamedTuple):
    """Where a verb's function is (`module:function`, without the package's name), and what it does, in a line."""

    function: str
    line: str


VERBS = {
    "train": Verb(
        "train:command", "train with ordinary Megatron arguments (under torchrun: -m dsv3_megatron train)"
    ),
    "train-hydra": Verb("train_hydra:main", "the same from Hydra's groups: model= layout= schedule= …"),
    "demo": Verb("demo.__main__:main", "train a small DeepSeek-V3 on this machine, without a GPU"),
    "doctor": Verb("doctor:main", "what is installed, and whether it fits together"),
    "plan": Verb("plan.__main__:main", "memory, time and cost of a layout before it is rented"),
    "search": Verb("plan.search:main", "the fastest layouts of a model on a cluster"),
    "dispatchers": Verb(
        "plan.dispatchers:main", "bytes and seconds of the three dispatchers, and where each wins"
    ),
    "dryrun": Verb(
        "dryrun.__main__:main", "build any rank of a layout on a laptop: real modules, real groups"
    ),
    "preflight": Verb(
        "preflight.__main__:main", "check a GPU job's launch line before the job, on any machine"
    ),
    "schedule": Verb("pipeline.show:main", "draw a pipeline schedule"),
    "compare": Verb("pipeline.compare:main", "pipeline schedules side by side"),
    "recipe": Verb("plan.recipe.show:main", "a recipe's learning rate, batch size, γ and λ over its tokens"),
    "ranks": Verb("plan.recipe.ranks:main", "which ranks each phase of a batch ramp can use"),
    "balance": Verb(
        "balance.show:main", "redundant experts from a run's logged loads: a plan and its picture"
    ),
    "chat": Verb("serve.chat:main", "talk to a fine-tuned model in a terminal"),
    "serve": Verb("serve.server:main", "a model behind OpenAI's API"),
    "generate": Verb("serve.generate:main", "answers to the prompts of a file, batched"),
    "sample": Verb("serve.sample:main", "answers kept where a reward says so (rejection sampling)"),
    "rollouts": Verb("serve.rollouts:main", "responses for a GRPO trainer that is another job"),
    "evaluate": Verb("serve.evaluate:main", "benchmarks of a model, through lm-evaluation-harness"),
    "convert": Verb("convert.__main__:main", "Hugging Face checkpoints in and out of Megatron, and verify"),
    "prove": Verb(
        "prove.__main__:main", "proofs: of a conversion, a resume, a layout, a version, an FP8 export"
    ),
    "adopt": Verb(
        "adopt.__main__:main", "what a launch script of Megatron-LM or a fork becomes under --spec dsv3"
    ),
    "data": Verb("data.prepare:main", "text files to a tokenised corpus"),
    "sft": Verb("sft.prepare:main", "conversations to packed rows for fine-tuning"),
    "preferences": Verb("posttrain.prepare:main", "pairs of answers to packed rows for DPO"),
    "card": Verb(
        "arguments.card:main", "enter a report of the GPU tests into the verification card: --report FILE"
    ),
    "kernels": Verb("fp8.kernels.compile:main", "compile the FP8 kernels for sm_90, without a GPU"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb with its words (default: the command line's); returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = words
    if name not in VERBS:
        print(f"error: dsv3 {name}: {nearest(name)}", file=sys.stderr)
        return 2
    module, _, function = VERBS[name].function.partition(":")
    sys.argv = [f"dsv3 {name}", *rest]  # where a main looks for its words
    try:
        result = getattr(importlib.import_module(f"{__package__}.{module}"), function)()
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has read enough (`| head`). What Python still holds goes nowhere, or its end would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return result if isinstance(result, int) else 0


def usage() -> str:
    """Every verb with its line."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.line}" for name, verb in VERBS.items()]
    return "\n".join(["usage: dsv3 VERB … (dsv3 VERB --help: its own words)", "", *lines])


def nearest(name: str) -> str:
    """What to say of a word that is no verb."""
    close = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
    hint = f"did you mean dsv3 {close[0]}?" if close else f"the verbs are {', '.join(VERBS)}"
    return f"no such verb; {hint}"
