"""The process of a reward: one JSON line [prompt, response, answer] in, one JSON line out.

    python -m dsv3_megatron.rewards.worker '[["answer", 1.0]]' '["/a/path"]'

What a reward prints goes to standard error: standard output is the channel.
"""

import json
import os
import sys
import threading
import time

from dsv3_megatron.rewards.named import Part, Weighted, resolve
from dsv3_megatron.rewards.runner import _call


def main() -> None:
    parts = tuple(Part(name, weight) for name, weight in json.loads(sys.argv[1]))
    sys.path[:] = json.loads(sys.argv[2])
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    single = len(parts) == 1 and parts[0].weight == 1.0
    reward = resolve(parts[0].name) if single else Weighted(parts)
    print("ready", file=channel, flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(_call(reward, *json.loads(line))), file=channel, flush=True)


def _leave_with(parent: int) -> None:
    """End when the scorer's process has ended, also in the middle of a reward."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
