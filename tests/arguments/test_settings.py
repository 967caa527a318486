"""Every DeepSeek-V3 setting is filled in when not given, kept when given, and refused when contradicted."""

import argparse
import re

import pytest

from dsv3_megatron.arguments import SETTINGS, RefusedArgument, complete, megatron_parser
from dsv3_megatron.arguments.command_line import parse, parse_given
from dsv3_megatron.arguments.complete import FULL_SPEC, contradiction, refuse_contradictions
from tests.arguments.lines import MICRO

FIRM = [setting for setting in SETTINGS if setting.kind in ("fixed", "recipe")]


@pytest.fixture(scope="module")
def parser():
    return megatron_parser()


@pytest.fixture
def world_of_8(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")


# Some settings apply only to half precision with the distributed optimizer.
HALF = argparse.Namespace(bf16=True, use_distributed_optimizer=True)
LOCAL = ["--transformer-impl", "local"]


def complete_args(parser, words):
    return parse(parser, complete([*LOCAL, *words], parser))


def test_spec_alone_is_the_671b_model(parser):
    """Against the configuration class of transformers, whose defaults are the released model's."""
    from transformers import DeepseekV3Config

    released = DeepseekV3Config()
    args = complete_args(parser, ["--spec", "dsv3", "--mock-data"])
    pairs = {
        "num_layers": released.num_hidden_layers,
        "hidden_size": released.hidden_size,
        "ffn_hidden_size": released.intermediate_size,
        "num_attention_heads": released.num_attention_heads,
        "q_lora_rank": released.q_lora_rank,
        "kv_lora_rank": released.kv_lora_rank,
        "qk_head_dim": released.qk_nope_head_dim,
        "qk_pos_emb_head_dim": released.qk_rope_head_dim,
        "v_head_dim": released.v_head_dim,
        "num_experts": released.n_routed_experts,
        "moe_ffn_hidden_size": released.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": released.n_shared_experts * released.moe_intermediate_size,
        "moe_router_topk": released.num_experts_per_tok,
        "moe_router_num_groups": released.n_group,
        "moe_router_group_topk": released.topk_group,
        "moe_router_topk_scaling_factor": released.routed_scaling_factor,
        "vocab_size": released.vocab_size,
        "layernorm_epsilon": released.rms_norm_eps,
        "attention_dropout": released.attention_dropout,
        "untie_embeddings_and_output_weights": not released.tie_word_embeddings,
        "add_qkv_bias": released.attention_bias,
    }
    assert {name: getattr(args, name) for name in pairs} == pairs
    dense = released.first_k_dense_replace
    assert args.moe_layer_freq == [0] * dense + [1] * (released.num_hidden_layers - dense)
    # The report's own values (§4.2), which no configuration file has.
    report = {
        "init_method_std": 0.006,
        "moe_aux_loss_coeff": [1e-4],
        "moe_router_bias_update_rate": 1e-3,
        "mtp_num_layers": 1,
        "mtp_loss_scaling_factor": 0.3,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "seq_length": 4096,
        "lr": 2.2e-4,
        "min_lr": 2.2e-5,
    }
    assert {name: getattr(args, name) for name in report} == report


def test_megatron_accepts_the_completed_line(parser, monkeypatch):
    """The completed arguments pass Megatron's validation and give the configuration that MLA reads."""
    import sys

    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from dsv3_megatron.arguments import add_arguments
    from dsv3_megatron.cpu import CPU_FLAGS

    monkeypatch.setattr(sys, "argv", ["train", *complete([*CPU_FLAGS, "--mock-data", "--train-iters", "1"])])
    args = parse_args(add_arguments)
    validate_args(args)
    config = core_transformer_config_from_args(args)
    # The softmax scale must not be multiplied by YaRN's factor before the long context.
    assert (config.rope_type, config.rotary_scaling_factor) == ("rope", 1.0)
    assert (config.q_lora_rank, config.kv_lora_rank, config.qk_layernorm) == (1536, 512, True)
    assert (config.beta_fast, config.beta_slow, config.original_max_position_embeddings) == (32, 1, 4096)
    assert config.moe_router_load_balancing_type == "seq_aux_loss" and config.moe_aux_loss_coeff == 1e-4


def test_long_context_uses_yarn(parser):
    args = complete_args(parser, ["--mock-data", "--rope-type", "yarn", "--seq-length", "32768"])
    assert (args.rotary_scaling_factor, args.mscale, args.mscale_all_dim) == (40.0, 1.0, 1.0)
    assert args.max_position_embeddings == 32768


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.flag], ids=lambda s: s.dest)
def test_what_is_given_is_not_filled_in_again(parser, setting, world_of_8):
    completed = complete([*LOCAL, *MICRO], parser)
    assert completed[:3] == ["--spec", *FULL_SPEC]
    assert completed.count(setting.flag) <= 1
    if setting.flag in MICRO:
        assert completed[completed.index(setting.flag) + 1] == MICRO[MICRO.index(setting.flag) + 1]


def contradicting_words(setting, parser) -> list[str] | None:
    """Words that set another value than DeepSeek-V3's, None where Megatron has no such option."""
    wanted = setting.value_for(HALF)
    accepted = (wanted, *setting.also)
    for action in parser._actions:
        if action.dest != setting.dest:
            continue
        option = action.option_strings[0]
        if action.nargs == 0:
            if action.const not in accepted:
                return [option]
        elif action.choices is not None:
            wrong = [choice for choice in action.choices if choice not in accepted]
            if wrong:
                return [option, wrong[0]]
        elif action.type in (int, float):
            return [option, str(action.type((wanted or 0) + 7))]
        else:
            return [option, "3,4"]
    return None


@pytest.mark.parametrize("setting", FIRM, ids=lambda s: s.dest)
def test_contradiction_is_refused(parser, setting):
    words = contradicting_words(setting, parser)
    if words is None:
        # Nothing can contradict it: DeepSeek-V3's values are the only ones that Megatron has.
        actions = [action for action in parser._actions if action.dest == setting.dest]
        possible = {value for action in actions for value in (action.choices or [action.const])}
        assert possible == {setting.value_for(HALF), *setting.also} and setting.flag
        return
    with pytest.raises(RefusedArgument) as refused:
        complete([*LOCAL, *MICRO, "--bf16", "--use-distributed-optimizer", *words], parser)
    text = str(refused.value)
    assert text.startswith(f"{words[0]} ") and setting.dest in text and setting.source in text
    assert "Leave" in text and (not setting.flag or f"or give {setting.flag}" in text)
    assert all(word in text for word in words[1:2] if word != "3,4")
    assert ("--allow-deviation" in text) == (setting.kind == "recipe")


@pytest.mark.parametrize("setting", [s for s in FIRM if s.also], ids=lambda s: s.dest)
def test_values_of_later_phases_are_accepted(parser, setting):
    for value in setting.also:
        given = parse_given(parser, [*MICRO, setting.flag, str(value)])
        assert getattr(given, setting.dest) == value
        refuse_contradictions(given, parser)


def test_deviation_must_be_named(parser):
    words = [*MICRO, "--weight-decay", "0.0"]
    with pytest.raises(RefusedArgument, match="--allow-deviation weight_decay"):
        complete([*LOCAL, *words], parser)
    assert complete_args(parser, [*words, "--allow-deviation", "weight_decay"]).weight_decay == 0.0


def test_only_training_settings_may_deviate(parser):
    words = [*LOCAL, *MICRO, "--normalization", "LayerNorm", "--allow-deviation", "normalization"]
    with pytest.raises(RefusedArgument, match="--allow-deviation normalization: only these may deviate"):
        complete(words, parser)


def test_zero_mtp_layers_turns_mtp_off(parser):
    assert complete_args(parser, [*MICRO, "--mtp-num-layers", "0"]).mtp_num_layers is None


@pytest.mark.parametrize(
    "spec", [["--spec", "dsv3"], ["--spec=dsv3"], ["--spec", "dsv3_megatron.specs", "dsv3"], []]
)
def test_forms_of_spec(parser, spec):
    completed = complete([*LOCAL, *spec, *MICRO], parser)
    assert parse(parser, completed).spec == FULL_SPEC
    assert sum(word.startswith("--spec") for word in completed) == 1
    # Completing again changes nothing.
    assert complete(completed, parser) == completed


def test_another_spec_is_refused(parser):
    with pytest.raises(RefusedArgument, match=r"--spec local: not this model's\. Use --spec dsv3"):
        complete(["--spec", "local", *MICRO], parser)


def test_unknown_option_names_its_neighbours(parser):
    with pytest.raises(RefusedArgument, match=r"--num-layer 4.*did you mean --num-layers"):
        complete(["--num-layer", "4"], parser)


def test_malformed_value_is_short(parser):
    with pytest.raises(RefusedArgument, match="--num-layers: invalid int value: 'four'") as refused:
        complete(["--num-layers", "four"], parser)
    assert len(str(refused.value)) < 200


def test_all_contradictions_are_told_at_once(parser):
    words = ["--normalization", "LayerNorm", "--moe-router-score-function", "softmax"]
    with pytest.raises(RefusedArgument, match=r"(?s)LayerNorm.*\n.*softmax"):
        complete([*LOCAL, *MICRO, *words], parser)


def test_message_names_the_option_as_typed(parser):
    setting = next(s for s in SETTINGS if s.dest == "layernorm_epsilon")
    text = contradiction(setting, 1e-5, argparse.Namespace(), parser)
    assert text.startswith("--norm-epsilon 1e-05 contradicts DeepSeek-V3: layernorm_epsilon is 1e-06")
    assert re.search(r"or give --norm-epsilon 1e-06", text)
