"""The picture of the demonstration: held-out reward of every arm and seed, length of responses, KL."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_megatron.files import whole

ARMS = {
    "rl": "rewards (GRPO)",
    "shuffled": "control: shuffled rewards",
    "sft": "demonstrations (SFT)",
    "dpo": "pairs of samples (DPO)",
}
_COLOURS = {"rl": "tab:blue", "shuffled": "tab:red", "sft": "tab:green", "dpo": "tab:orange"}


def draw(
    held_out: Mapping[tuple[str, int], Mapping[int, Mapping[str, float]]],
    journals: Mapping[tuple[str, int], list[dict[str, Any]]],
    path: Path,
) -> None:
    """Write a PNG.

    Args:
        held_out: by (arm, seed): iteration → {"reward", "length"} on held-out problems.
        journals: by (arm, seed): the steps of post-training (`posttrain.journal`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (reward, length, kl) = pyplot.subplots(1, 3, figsize=(15, 4))
    named: set[str] = set()
    for (arm, _seed), curve in held_out.items():
        label = None if arm in named else ARMS[arm]
        named.add(arm)
        steps = sorted(curve)
        reward.plot(
            steps, [curve[i]["reward"] for i in steps], color=_COLOURS[arm], label=label, linewidth=1.2
        )
        length.plot(steps, [curve[i]["length"] for i in steps], color=_COLOURS[arm], linewidth=1.2)
    for (arm, _seed), lines in journals.items():
        # DPO's is another measure, of the pairs' answers.
        points = [(line["iteration"], line["kl"]) for line in lines if "kl" in line and "reward" in line]
        if points:
            kl.plot(*zip(*points, strict=True), color=_COLOURS[arm], linewidth=1)
    reward.set(xlabel="iteration", ylabel="share right", title="Held-out problems", ylim=(0, 1))
    reward.axhline(0.2, color="black", linewidth=0.6, linestyle=":")
    reward.axhline(0.6, color="black", linewidth=0.6, linestyle=":")
    reward.legend(fontsize="small")
    length.set(xlabel="iteration", ylabel="tokens", title="Length of held-out responses")
    kl.set(xlabel="iteration", ylabel="nats per token", title="KL to the base model, of the rollouts")
    figure.tight_layout()
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    pyplot.close(figure)
