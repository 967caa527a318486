"""What happens when something fails: a rank, a disk, a number. See docs/resilience.md."""

import sys
from pathlib import Path
from typing import Any

from dsv3_megatron.errors import RefusedArgument

PATCHES = ("save_checkpoint", "read_metadata")


def install(args: Any) -> None:
    """Before anything is built, with validated arguments: save paths, checkpoints, guarded steps.

    Raises:
        RefusedArgument: nothing can be written to `--save`.
    """
    from dsv3_megatron.patching import install as install_patches
    from dsv3_megatron.resilience import guard, save_path, watch
    from dsv3_megatron.training import hooks

    if args.save:
        try:
            save_path.check(Path(args.save), args.rank)
        except RefusedArgument as error:
            if args.rank != 0:  # rank 0 may be on another machine, where all is well
                print(f"rank {args.rank}: error: {error}", file=sys.stderr, flush=True)
            raise
    install_patches(PATCHES)
    hooks.before_step(watch.note_step)
    guard.install(args)
