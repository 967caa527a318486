"""`python -m dsv3_megatron.dryrun model=v3_671b layout=pp16_ep64 rank=2047 output=json`."""

import json
import sys

from dsv3_megatron.conf import ConfigError, compose
from dsv3_megatron.dryrun.start import start_megatron
from dsv3_megatron.errors import exits_cleanly

USAGE = """usage: python -m dsv3_megatron.dryrun [rank=N] [output=table|json] [NAME=VALUE ...]

Builds one rank of a layout on the meta device with Megatron's own groups and modules, without GPU or network.
NAME=VALUE: as in dsv3_megatron.train_hydra, and layouts for serving: layout=prefill_tp4_dp8_ep32,
layout=decode_tp4_dp80_ep320."""


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return
    own, overrides = {"rank": "0", "output": "table"}, []
    for text in argv:
        name, _, value = text.partition("=")
        if name in own:
            own[name] = value
        else:
            overrides.append(text)
    if own["output"] not in ("table", "json"):
        raise ConfigError(f"output={own['output']}: use output=table or output=json")
    if not own["rank"].isdigit():
        raise ConfigError(f"rank={own['rank']}: a rank is a whole number from 0")
    cfg = compose(overrides, serving=True)

    start_megatron()
    from dsv3_megatron.dryrun.report import build_rank

    report = build_rank(cfg, int(own["rank"]), progress=True)
    print(json.dumps(report.as_dict()) if own["output"] == "json" else report.table())


if __name__ == "__main__":
    main()
