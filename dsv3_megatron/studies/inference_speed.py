"""Tokens per second of `dsv3 generate`'s engine beside transformers' `generate` with its cache, in one run on the CPU.

python -m dsv3_megatron.studies.inference_speed [--batch 8] [--new-tokens 128] [--repeats 3]

Both have the same random weights of a small model (the demo's sizes), in fp32, one thread, the same prompts of even
length, and greedily write the same number of tokens; they take turns, and the medians are compared, of seconds and of
processor time, which other work on the machine disturbs less. The tokens must be equal. The last line on stdout is one
JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument, exits_cleanly
from dsv3_megatron.serve.load import Layout, loaded_model, use_device
from dsv3_megatron.serve.source import open_source

__all__ = ["main"]

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "num_nextn_predict_layers": 0,
}
PROMPT = 64  # tokens


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="prompts at the same time")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    for name in ("batch", "new_tokens", "repeats"):
        if getattr(options, name) < 1:
            raise RefusedArgument(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")
    use_device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_bench(Path(folder), options)))
    return 0


def _bench(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from dsv3_megatron.inference import Engine, EngineSettings, Sampling

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = DeepseekV3Config(**SIZES)
    theirs = DeepseekV3ForCausalLM(config).float().eval()
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(folder)
    prompts = torch.randint(1, SIZES["vocab_size"], (options.batch, PROMPT))
    how = Sampling(max_new_tokens=options.new_tokens, temperature=0, ignore_ends=True)
    settings = EngineSettings(max_length=PROMPT + options.new_tokens, max_batch=options.batch)
    with loaded_model(open_source(None, folder), Layout(), "fp32", "local") as model:
        engine = Engine(model, settings)

        def by_us() -> list[list[int]]:
            return [generation.tokens for generation in engine.generate(prompts.tolist(), how)]

        def by_them() -> list[list[int]]:
            found = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=options.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            return found[:, PROMPT:].tolist()

        times: dict[str, list[tuple[float, float]]] = {"dsv3": [], "transformers": []}
        for repeat in range(options.repeats + 1):  # the first warms up
            answers = {}
            for name, run in (("dsv3", by_us), ("transformers", by_them)):
                took, answers[name] = _timed(run)
                if repeat:
                    times[name].append(took)
            print(f"run {repeat} of {options.repeats}", file=sys.stderr, flush=True)
        engine.close()
    count = options.batch * options.new_tokens
    (ours, our_processor), (others, their_processor) = (
        [count / statistics.median(kind) for kind in zip(*times[name], strict=True)]
        for name in ("dsv3", "transformers")
    )
    return {
        "batch": options.batch,
        "new_tokens": options.new_tokens,
        "tokens_per_s": ours,
        "transformers_tokens_per_s": others,
        "ratio": ours / others,
        "processor_time_ratio": our_processor / their_processor,
        "tokens_equal": answers["dsv3"] == answers["transformers"],
    }


def _timed(run: Callable[[], list[list[int]]]) -> tuple[tuple[float, float], list[list[int]]]:
    """(seconds, seconds of the processor) and the answers."""
    begin, processor = time.perf_counter(), time.process_time()
    found = run()
    return (time.perf_counter() - begin, time.process_time() - processor), found


if __name__ == "__main__":
    sys.exit(main())
