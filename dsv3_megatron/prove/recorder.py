"""A rank of a proof: the trainer, with what it computed written down.

    torchrun … recorder.py JOB.json

Started as a script, so that it records any installed version of the package. The job: {"words", "output" (folder),
"gradients": bool, "spoil": name of a control or "", "site": folder of packages that stands first on the path, or ""}.
Rank r writes OUTPUT/rank-r.json ({"steps": [{"loss", …, "grad_norm", "skipped"}], "end", "loaded": what was imported
from that folder}), and OUTPUT/gradients-r.pt with the first step's gradients by global name.
"""

import importlib
import json
import os
import sys

if __name__ == "__main__":  # a script's own folder stands first on the path: its modules are no packages
    HERE = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place or ".") != HERE]


def loaded_from(site):
    """Top-level packages of which modules in this folder were imported."""
    if not site:
        return []
    inside = os.path.join(os.path.realpath(site), "")
    files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
    return sorted(
        {name.split(".")[0] for name, file in files.items() if os.path.realpath(file).startswith(inside)}
    )


def record(job):
    """Train this rank as the job says, and write down what it computes."""
    rank = int(os.environ.get("RANK", "0"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from dsv3_megatron import cpu

    cpu.activate()
    import torch

    from dsv3_megatron.training import hooks

    train = importlib.import_module(
        "dsv3_megatron.train"
    )  # started as people start it: no tool imports a command

    steps, gradients = [], {}

    def numbers(value):
        return float(value.double().sum()) if isinstance(value, torch.Tensor) else float(value)

    def after(call, result):
        losses, skipped, *_ = result
        row = {"skipped": int(skipped)}
        for name, value in losses.items():
            value = value if not isinstance(value, tuple | list) else value[0] / value[1]
            if isinstance(value, torch.Tensor) and value.numel() == 2:
                value = value[0] / value[1]
            row[name] = numbers(value)
        norm = result[5]
        row["grad_norm"] = None if norm is None else numbers(norm)
        steps.append(row)

    def before(call):
        if gradients or not job.get("gradients"):
            return
        from dsv3_megatron.specs.names import global_names, named_weights

        for chunk in call["model"]:
            names = global_names(chunk)
            for local, weight in named_weights(chunk).items():
                if getattr(weight, "main_grad", None) is not None:
                    shard = names[local].shard
                    value = weight.main_grad.detach().float().clone()
                    if (
                        job.get("spoil") == "gradient"
                        and names[local].name == "decoder.final_layernorm.weight"
                    ):
                        value = value * 1.001
                    gradients[names[local].name] = (
                        (shard.dim, shard.index, shard.count, shard.blocks),
                        value,
                    )

    hooks.after_step(after)
    hooks.before_update(before)
    end = "done"
    try:
        train.main(job["words"])
    except SystemExit as left:
        end = f"exit {left.code}"
        if left.code not in (0, None):
            raise
    finally:
        with open(os.path.join(job["output"], f"rank-{rank}.json"), "w") as file:
            json.dump({"steps": steps, "end": end, "loaded": loaded_from(job.get("site"))}, file)
    if job.get("gradients"):
        torch.save(gradients, os.path.join(job["output"], f"gradients-{rank}.pt"))


if __name__ == "__main__":
    with open(sys.argv[1]) as words:
        record(json.load(words))
