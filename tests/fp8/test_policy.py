"""The policy table on real modules and optimizer states."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv3_megatron.fp8 import policy
from dsv3_megatron.fp8.linear import FP8AttentionOutput, FP8DownProjection, FP8WeightGrad
from dsv3_megatron.specs.select import select_backend
from tests.fp8.kept import SIZES, assert_table, kept_by_module
from tests.harness import run_distributed
from tests.specs.models import build, micro_config, random_batch

PRECISION = {"bf16": True, "params_dtype": torch.bfloat16}


def rows(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, policy.Row]]:
    """Every module that owns a parameter or computes attention, with its row; none is without."""
    for name, module in model.named_modules():
        owns = next(module.parameters(recurse=False), None) is not None
        if owns or name.endswith("core_attention"):
            row = policy.row_of(name)
            assert row is not None, f"{name} is not in the policy"
            yield name, module, row


@pytest.mark.usefixtures("single_rank")
class TestReference:
    def test_modules(self) -> None:
        model = build(micro_config(mtp_num_layers=1, fp8_recipe="dsv3", **PRECISION))
        seen = set()
        for name, module, row in rows(model):
            seen.add(row.what)
            assert isinstance(module, FP8WeightGrad) == row.fp8, name
            assert isinstance(module, FP8AttentionOutput) == (row.what == "Linear after attention"), name
            assert isinstance(module, FP8DownProjection) == (row.what == "second Linear of an MLP"), name
            assert all(p.dtype == torch.bfloat16 for p in module.parameters(recurse=False)), name
        assert seen == {row.what for row in policy.POLICY}

    def test_what_modules_compute_in(self) -> None:
        """Inputs and outputs of the modules that are not FP8's, in a real forward pass."""
        model = build(micro_config(fp8_recipe="dsv3", **PRECISION))
        dtypes: dict[str, set[torch.dtype]] = {}

        def record(what: str) -> Any:
            def hook(module: Any, inputs: tuple, output: Any) -> None:
                tensors = [
                    t for t in (*inputs, output) if isinstance(t, torch.Tensor) and t.is_floating_point()
                ]
                dtypes.setdefault(what, set()).update(t.dtype for t in tensors)

            return hook

        for _, module, row in rows(model):
            module.register_forward_hook(record(row.what))
        gate = model.decoder.layers[1].mlp.router
        gating = gate.gating

        def recorded(x: torch.Tensor) -> torch.Tensor:
            logits = gating(x)
            dtypes["logits"] = {logits.dtype}
            return logits

        gate.gating = recorded
        model(**random_batch(), attention_mask=None)
        assert dtypes["attention operators"] == dtypes["norms"] == {torch.bfloat16}
        assert dtypes["embedding"] == {torch.bfloat16}
        assert dtypes["logits"] == {torch.float32}
        assert gate.expert_bias.dtype == torch.float32

    def test_what_is_kept(self) -> None:
        """The table's last column against the tensors that live after a forward pass, module by module."""
        sizes = SIZES | {"fp8_recipe": "dsv3"}
        model = build(micro_config(**sizes, **PRECISION))
        batch = random_batch(batch=1, seq=128)
        model(**batch, attention_mask=None)
        found = kept_by_module(model, lambda: model(**batch, attention_mask=None))
        assert_table(model, found, "local", tokens=128)

    def test_without_the_recipe_nothing_changes(self) -> None:
        """The very backend object, and so the very classes, that there are without FP8."""
        from dsv3_megatron.backends import reference

        config = micro_config(**PRECISION)
        assert select_backend(config.transformer) is reference.BACKEND
        assert not any(isinstance(module, FP8WeightGrad) for module in build(config).modules())


def optimizer_formats(rank: int, world_size: int) -> dict[str, set[str]]:
    """Train two steps with our trainer; formats of what its optimizer holds."""
    import functools

    from megatron.training import training

    from dsv3_megatron import train
    from dsv3_megatron.conf import compose, to_argv

    kept = []
    original = training.setup_model_and_optimizer

    @functools.wraps(original)
    def keep(*args: Any, **kwargs: Any) -> Any:
        kept.append(original(*args, **kwargs))
        return kept[-1]

    training.setup_model_and_optimizer = keep
    overrides = ["model=micro", "layout=cpu_single", "precision=fp8_dsv3", "device=cpu", "train_iters=2"]
    train.main(to_argv(compose([*overrides, "seq_length=32", "max_position_embeddings=32", "eval_iters=0"])))
    model, optimizer, _ = kept[0]
    formats: dict[str, set[str]] = {name: set() for name in policy.OPTIMIZER}
    for part in optimizer.chained_optimizers:
        formats["main_grads_dtype"] |= {str(p.main_grad.dtype) for p in model[0].parameters()}
        for state in part.optimizer.state.values():
            formats["exp_avg_dtype"].add(str(state["exp_avg"].dtype))
            formats["exp_avg_sq_dtype"].add(str(state["exp_avg_sq"].dtype))
            formats["main_params_dtype"].add(str(state["master_param"].dtype))
    formats["fp8 modules"] = {type(m).__name__ for m in model[0].modules() if isinstance(m, FP8WeightGrad)}
    return formats


def test_optimizer_of_the_trainer() -> None:
    formats = run_distributed(optimizer_formats, world_size=1, timeout=300, init=False)[0]
    names = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}
    layers = {"FP8AttentionOutput", "FP8ColumnLinear", "FP8DownProjection", "FP8DuplicatedLinear"}
    assert formats.pop("fp8 modules") == layers
    assert formats == {name: {names[value]} for name, value in policy.OPTIMIZER.items()}


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_table_is_printed_once(impl: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is kept on the backend that runs, and what is dispatched."""
    policy._print_once.cache_clear()
    for recipe in ("delayed", "dsv3", "dsv3"):
        policy.announce(SimpleNamespace(fp8_recipe=recipe, transformer_impl=impl))
    text = capsys.readouterr().out
    assert text.count("--fp8-recipe dsv3") == 1 and re.search(r"dispatch +E4M3", text)
    for row in policy.POLICY:
        line = next(line for line in text.splitlines() if line.startswith(f">   {row.what} "))
        assert row.compute in line and line.endswith(row.kept(impl) or row.compute)
    policy.announce(SimpleNamespace(fp8_recipe="dsv3", fp8_dispatch="bf16", transformer_impl=impl))
    assert re.search(r"dispatch +BF16", capsys.readouterr().out)
