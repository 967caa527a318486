"""What the ranks of `test_launch.py` run: each prints, then rank 1 does what the first argument says."""

import os
import signal
import sys
import time


def fail() -> None:
    raise RuntimeError("no such expert")


def main() -> None:
    print(f"[demo] hello from rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}", flush=True)
    deed = sys.argv[1]
    if os.environ["RANK"] == "1":
        if deed == "raise":
            from torch.distributed.elastic.multiprocessing.errors import record  # seconds

            record(fail)()
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "exit":
            sys.exit(3)
    if deed != "end":
        time.sleep(120)  # as a rank that waits for its peers


if __name__ == "__main__":
    main()
