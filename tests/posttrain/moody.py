"""A reward that does what the response says."""

import math
import os
import time


def reward(prompt: str, response: str, answer: str) -> float:
    print("a reward may print")
    if response == "raise":
        raise ValueError("no such response")
    if response == "hang":
        time.sleep(600)
    if response == "die":
        os._exit(3)
    return {"nan": math.nan, "inf": math.inf}.get(response, float(response == answer))
