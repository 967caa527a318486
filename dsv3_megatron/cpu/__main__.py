"""`python -m dsv3_megatron.cpu <script.py | -m module> ...`: activate, then run it as `__main__`."""

import os
import runpy
import sys

from dsv3_megatron.cpu import activate

USAGE = "usage: python -m dsv3_megatron.cpu <script.py | -m module> [arguments ...]"


def main() -> None:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help") or argv == ["-m"]:
        sys.exit(USAGE)
    activate()
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        # As `python script.py` does: the script's folder first, so that it finds its neighbours.
        sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
