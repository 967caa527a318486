"""What an answer is worth: rewards that can be verified, and a runner that outlives them.

A reward is a function `reward(prompt, response, answer) -> float`. `answer` is what the data set gives with the
prompt, any JSON value: the solution's text, the tests of a program, the entry of a generated task. A reward is named
by a shipped name (`names()`), by "module:function", or by several of these with weights ("answer=1,format=0.2").

    from dsv3_megatron import rewards
    rewards.resolve("answer")("2 + 2 = ?", "<think>…</think> <answer>4</answer>", "4")      # 1.0
    with rewards.Scorer("answer=1,format=0.2", workers=4) as scorer:
        scores = scorer.score(prompts, responses, answers)          # never raises for a sample: see Score.outcome

Nothing here imports Megatron or torch. See docs/rewards.md.
"""

from dsv3_megatron.rewards.named import Reward, names, resolve
from dsv3_megatron.rewards.runner import Score, Scorer, score

__all__ = ["Reward", "Score", "Scorer", "names", "resolve", "score"]
