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


def parity(prompt: str, response: str, answer: str) -> float:
    """Of the characters' codes: half of what an untrained model says is right."""
    return float(sum(map(ord, response)) % 2)


def often_bad(prompt: str, response: str, answer: str) -> float:
    """As `parity`, but a third raises, and another third is no number."""
    kind = sum(map(ord, response)) % 3
    if kind == 0:
        raise RuntimeError("a bad sample")
    return math.nan if kind == 1 else float(len(response) % 2)
