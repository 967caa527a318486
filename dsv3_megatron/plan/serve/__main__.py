"""`dsv3 plan serve model=v3_671b layout=decode_tp4_dp80_ep320`: what a layout for serving would do."""

import json
import sys
from typing import Any

from dsv3_megatron.errors import exits_cleanly
from dsv3_megatron.plan.job import PlanError
from dsv3_megatron.plan.serve.job import ServingJob
from dsv3_megatron.plan.serve.options import job_of, parse
from dsv3_megatron.plan.serve.published import error_rows
from dsv3_megatron.plan.serve.result import Result, full, serve, variants

USAGE = """usage: dsv3 plan serve model=NAME layout=prefill_tp4_dp8_ep32|decode_tp4_dp80_ep320 [NAME=VALUE ...]

Predicts latency, throughput, cache and the largest batch of a layout for serving. NAME=VALUE: as in dsv3 plan
(model=, layout=, cluster.gpu=, cluster.nodes=, serving.redundant_experts=, …), and:

  context=4096        tokens of a request in the cache, on average; in prefill of a prompt
  batch=N             requests per GPU (default: decode as many as fit, prefill 16384 tokens)
  weights=bf16|fp8    cache=bf16|fp8
  mtp=off|on|0.85     drafts, and the share of them that is accepted (on: 0.85)
  redundancy=on|off   copies of experts
  imbalance=1.0       tokens of the fullest GPU's experts over the mean (redundancy=off: at least the planner's 1.075)
  attention=absorbed|expanded, cached=0.5   of prefill: how prompts attend, and their share found in the cache
  output=table|json"""


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return
    options = parse(argv)
    job = _quietly(options)
    result = serve(job)
    others = {name: _of_variant(variant, options.batch is None) for name, variant in variants(job).items()}
    errors = error_rows()
    if options.output == "json":
        told = {name: one if isinstance(one, str) else one.as_dict() for name, one in others.items()}
        print(json.dumps(result.as_dict() | {"variants": told, "errors": errors}))
        return
    print(_summary(result))
    print("\n" + _variants(others))
    print("\n" + _errors(errors))


def _quietly(options: Any) -> ServingJob:
    from dsv3_megatron.dryrun.start import start_megatron

    start_megatron()  # whose reader of --moe-layer-freq is used
    return job_of(options)


def _of_variant(job: ServingJob, fill: bool) -> Result | str:
    """Its result, or why there is none; with as many requests as fit where none were given."""
    try:
        return serve(full(job) if fill and job.phase == "decode" else job)
    except PlanError as error:
        return str(error)


def _summary(result: Result) -> str:
    job, time = result.job, result.time
    per = "answer's token" if job.phase == "decode" else "prompt's first token"
    drafts = "without drafts" if job.acceptance is None else f"drafts accepted {job.acceptance:.0%}"
    rows = [
        ("phase", f"{job.phase}, {job.num_gpus} {job.gpu.name}, attention TP{job.tp}, {drafts}"),
        (
            "experts",
            f"{job.num_slots} slots, {job.slots_per_gpu:g} per GPU, fullest GPU {job.imbalance:g} of the mean",
        ),
        ("batch", f"{job.batch:.2f} requests per GPU (most: {result.max_batch:.2f}) of {job.context} tokens"),
        ("a pass", f"{time.total * 1e3:.2f} ms, mostly {time.bound}"),
        (per, f"{result.latency_per_token_s * 1e3:.2f} ms"),
        (
            "throughput",
            f"{result.tokens_per_s_per_gpu:,.0f} tokens/s per GPU, "
            f"{result.tokens_per_s_per_gpu * job.gpu.node:,.0f} per node",
        ),
        (
            "cache",
            f"{job.cache_bytes_per_token:,.0f} bytes per token, "
            f"{job.cache_bytes_per_token * job.context / 2**20:,.1f} MiB per request",
        ),
        *((f"  {name}", f"{size / 2**30:.2f} GiB") for name, size in result.memory.items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _variants(others: dict[str, Result | str]) -> str:
    lines = [f"{'':<27}  {'GPUs':>4}  {'batch':>8}  {'ms/token':>8}  {'tokens/s/GPU':>12}"]
    for name, one in others.items():
        if isinstance(one, str):
            lines.append(f"{name:<27}  {one}")
        else:
            lines.append(
                f"{name:<27}  {one.job.num_gpus:>4}  {one.job.batch:>8.2f}  "
                f"{one.latency_per_token_s * 1e3:>8.2f}  {one.tokens_per_s_per_gpu:>12,.0f}"
            )
    return "\n".join(lines)


def _errors(rows: list[dict[str, Any]]) -> str:
    lines = [
        "how far to believe it (tokens/s per node; the fitted row chose one number, the judges none):",
        f"{'':<46}  {'published':>9}  {'predicted':>9}  {'error':>6}  half",
    ]
    for row in rows:
        lines.append(
            f"{row['name']:<46}  {row['published_tokens_per_s_per_node']:>9,.0f}  "
            f"{row['predicted_tokens_per_s_per_node']:>9,.0f}  {row['error_percent']:>+5.0f}%  {row['half']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
