"""Rewards for the tests, without anything heavy to import."""

import math
import os
import time


def reward(prompt: str, response: str, answer: str) -> float:
    """Does what the response says."""
    print("a reward may print")
    if response == "raise":
        raise ValueError("no such response")
    if response == "hang":
        time.sleep(600)
    if response == "die":
        os._exit(3)
    return {"nan": math.nan, "inf": math.inf}.get(response, float(response == answer))


def dreadful(prompt: str, response: str, answer: str) -> float:
    """As `parity`, but of seven responses one raises, one is no number, one hangs and one ends the process."""
    kind = sum(map(ord, response)) % 7
    if kind < 4:
        return reward(prompt, ("raise", "nan", "hang", "die")[kind], answer)
    return float(len(response) % 2)


def parity(prompt: str, response: str, answer: str) -> float:
    """Of the characters' codes: half of what an untrained model says is right."""
    return float(sum(map(ord, response)) % 2)


def alike(prompt: str, response: str, answer: str) -> float:
    """Nothing to learn from."""
    return 0.25
