"""The arguments that a conversion prints build the model that config.json describes (known failure 8: YaRN too)."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from dsv3_megatron.convert.__main__ import command_line, hydra_model
from dsv3_megatron.convert.architecture import Architecture, Yarn
from dsv3_megatron.convert.logits import transformer_fields
from tests.harness import run_distributed

V3 = Architecture(
    num_layers=61,
    num_dense_layers=3,
    hidden_size=7168,
    ffn_hidden_size=18432,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
    num_experts=256,
    moe_ffn_hidden_size=2048,
    num_shared_experts=1,
    moe_router_topk=8,
    moe_router_num_groups=8,
    moe_router_group_topk=4,
    moe_router_topk_scaling_factor=2.5,
    mtp_num_layers=1,
    vocab_size=129280,
    max_position_embeddings=163840,
    rotary_base=10000,
    layernorm_epsilon=1e-6,
    yarn=Yarn(40),
)
OTHER = dataclasses.replace(
    V3,
    num_layers=4,
    num_dense_layers=1,
    q_lora_rank=None,
    num_shared_experts=2,
    mtp_num_layers=0,
    moe_router_num_groups=1,
    moe_router_group_topk=1,
    yarn=Yarn(40, original_max_position_embeddings=2048, beta_fast=16, beta_slow=2),
)
PLAIN = dataclasses.replace(V3, yarn=None)
# Fields in which a trainer's configuration may differ from that of a model in one process.
OF_THE_RUN = {"moe_router_load_balancing_type", "perform_initialization", "gradient_accumulation_fusion"}


def trainer_fields(rank: int, world_size: int, words: list[str]) -> dict:
    """What the trainer's own parser makes of the words."""
    import shlex

    from dsv3_megatron.cpu import CPU_FLAGS
    from dsv3_megatron.dryrun.world import megatron_args, model_config

    given = [*shlex.split(" ".join(words)), "--spec", "dsv3", "--mock-data", *CPU_FLAGS]
    args = megatron_args(given, 0, 1, 1)
    config = model_config(args)
    fields = {name: getattr(config.transformer, name) for name in transformer_fields(V3)}
    return fields | {"vocab_size": args.padded_vocab_size, "activation_func": None}


@pytest.mark.parametrize("arch", [V3, OTHER, PLAIN], ids=["v3", "other", "plain"])
def test_printed_arguments_build_the_model_of_config_json(arch: Architecture) -> None:
    words = [command_line(arch.arguments())]
    built = run_distributed(trainer_fields, world_size=1, init=False, words=words)[0]
    expected = transformer_fields(arch) | {"activation_func": None, "vocab_size": arch.vocab_size}
    different = {
        name: (built[name], value)
        for name, value in expected.items()
        if built[name] != value and name not in OF_THE_RUN
    }
    assert different == {}


@pytest.mark.parametrize("arch", [V3, OTHER, PLAIN], ids=["v3", "other", "plain"])
def test_architecture_survives_config_json_and_megatrons_arguments(arch: Architecture) -> None:
    assert Architecture.from_hf(arch.to_hf(), arch.mtp_num_layers) == arch
    assert Architecture.from_megatron(arch.namespace(), arch.vocab_size, arch.mtp_num_layers) == arch


def test_hydra_model_is_that_of_the_repository() -> None:
    """What config.json of the release gives is `model=v3_671b`, but for YaRN and what no checkpoint knows."""
    ours = Path(__file__).parents[2] / "dsv3_megatron" / "conf" / "model" / "v3_671b.yaml"
    expected, printed = yaml.safe_load(ours.read_text()), yaml.safe_load(hydra_model(PLAIN.arguments()))
    expected["moe_layer_freq"] = printed["moe_layer_freq"]  # the same list, spelled by hand in one of them
    only_there = {"init_method_std"}
    assert {
        name: float(v) if name == "norm_epsilon" else v for name, v in printed.items() if name in expected
    } == {name: value for name, value in expected.items() if name not in only_there}
    assert printed.keys() - expected.keys() == {"max_position_embeddings"}
