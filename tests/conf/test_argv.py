"""From configuration to arguments, read back by Megatron's own parser."""

import shlex

import pytest
from omegaconf import DictConfig, OmegaConf

from dsv3_megatron.arguments import complete
from dsv3_megatron.arguments.command_line import choices_of
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.conf import ConfigError, compose, groups, to_argv, to_command
from dsv3_megatron.conf.argv import options, parser, to_megatron_argv
from dsv3_megatron.conf.check import world_size
from dsv3_megatron.conf.compose import SECTIONS
from dsv3_megatron.errors import RefusedArgument


def read_back(overrides: list[str]):
    return parser().parse_args(to_megatron_argv(compose(overrides)))


@pytest.mark.parametrize("model", groups()["model"])
def test_every_setting_arrives(model: str) -> None:
    """What the configuration says is what Megatron's parser gets, key by key."""
    layout = "pp8_ep8" if model == "v3_16b" else "pp16_ep64" if model == "v3_671b" else "cpu_pp2_ep2"
    cfg = compose([f"model={model}", f"layout={layout}"])
    args = parser().parse_args(to_megatron_argv(cfg))
    for name, value in ((str(name), value) for name, value in cfg.items()):
        if name in (*SECTIONS, "device") or value is None:
            continue
        got = getattr(args, options()[name][1].dest)
        if name == "moe_layer_freq":
            assert got == eval(value)
        elif name in ("q_lora_rank", "mtp_num_layers"):
            assert (got or 0) == value, name  # Megatron's word for "none of that" is None
        elif isinstance(got, list):
            assert got == (list(value) if OmegaConf.is_list(value) else [value])
        else:
            assert got == value, name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("no_rope_fusion=true", ["--no-rope-fusion"]),
        ("no_rope_fusion=false", []),
        ("recompute_modules=[mla_up_proj,layernorm]", ["--recompute-modules", "mla_up_proj", "layernorm"]),
        ("recompute_modules=mla_up_proj", ["--recompute-modules", "mla_up_proj"]),
        ("inference_wandb_logging=false", ["--no-inference-wandb-logging"]),
        ("inference_wandb_logging=true", ["--inference-wandb-logging"]),
        ("null_tokenizer_pad_id=-1", ["--null-tokenizer-pad-id=-1"]),
        ("lr_warmup_iters=null", []),
        ("save=null", []),
    ],
)
def test_kinds_of_arguments(override: str, words: list[str]) -> None:
    name = override.split("=")[0]
    without = to_argv(compose([f"{name}=null"]))
    argv = to_argv(compose([override]))
    assert argv == without + words or (words and sorted(argv) == sorted(without + words))


def test_every_choice_of_every_argument_can_be_given() -> None:
    """Enums by name, as on the command line."""
    enums = set()
    for name, (_, action) in options().items():
        for choice, value in zip(action.choices or (), choices_of(action) or (), strict=True):
            enums.update([name] if value is not choice else [])
            several = action.nargs not in (None, "?")
            words = to_megatron_argv(DictConfig({name: [value] if several else value}))
            found = getattr(parser().parse_args(words), action.dest)
            assert (found[0] if several else found) == choice
    assert "attention_backend" in enums


def test_any_megatron_argument_can_be_an_override() -> None:
    args = read_back(["train_iters=50", "global_batch_size=32", "exit_interval=7", "log_throughput=true"])
    assert (args.train_iters, args.global_batch_size, args.exit_interval) == (50, 32, 7)
    assert args.log_throughput is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian_iters=5", "trian_iters=5: no such argument; did you mean 'train_iters'?"),
        ("modle=tiny", "did you mean 'model'?"),
        ("nodes=8", "nodes=8: no such argument; did you mean 'cluster.nodes'?"),
        ("apply_rope_fusion=false", "the command line calls it no_rope_fusion"),
        ("lr=fast", "argument --lr: invalid float value: 'fast'"),
        ("bf16=yes_please", "bf16=yes_please: is a flag, use bf16=true or bf16=false"),
        ("train_iters=[1,2]", "train_iters=[1, 2]: takes one value"),
        ("attention_backend=fussed", "attention_backend=fussed: not possible; did you mean 'fused'?"),
        ("optimizer=adamm", "optimizer=adamm: not possible; did you mean 'adam'?"),
        ("device=gpu", "device=gpu: use device=cuda or device=cpu"),
    ],
)
def test_wrong_arguments_name_the_nearest_valid_one(override: str, message: str) -> None:
    with pytest.raises(RefusedArgument) as error:
        to_argv(compose([override]))
    assert message in str(error.value)


def fitting_combinations(models: list[str]) -> list[list[str]]:
    """Every one of the models with every layout it fits, its cluster, recipe and precision coming with them; and the
    rest of the options on the default model."""
    fitting = []
    for model in models:
        for layout in groups()["layout"]:
            try:
                compose([f"model={model}", f"layout={layout}"])
            except ConfigError:
                continue
            fitting.append([f"model={model}", f"layout={layout}"])
    for group in ("precision", "data", "recipe", "schedule"):
        # Fine-tuning and post-training are refused without their prepared data: tests/sft, tests/posttrain
        needing = ("sft", "dpo", "grpo", "preference", "prompts")
        fitting += [[f"{group}={option}"] for option in groups()[group] if option not in needing]
    for overrides in fitting:
        if OmegaConf.is_missing(compose(overrides), "pretrained_checkpoint"):
            overrides.append("pretrained_checkpoint=checkpoints")
        if "layout=pp16_ep64" in overrides:
            overrides.append("cluster.nodes=128")  # where the ramp of the batch begins under DualPipe
    return fitting


@pytest.mark.parametrize(
    "models",
    [["micro", "v3_671b"], pytest.param(groups()["model"], marks=pytest.mark.slow)],
    ids=["two models", "all models"],
)
def test_every_combination_is_a_deepseek_v3(models: list[str]) -> None:
    """None contradicts a DeepSeek-V3 setting or is refused on its own cluster: `complete` is what the
    trainer runs.
    """
    combinations = fitting_combinations(models)
    assert len(combinations) >= 8 + 5 * len(models)
    for overrides in combinations:
        cfg = compose(overrides)
        on_cpu = cfg.get("device") == "cpu"
        there = Surroundings(
            world_size=world_size(cfg),
            ranks_per_node=cfg.cluster.gpus_per_node,
            on_cpu=on_cpu,
            has_te=not on_cpu,
            files_here=False,
        )
        complete(to_megatron_argv(cfg), parser(), around=there)


def test_names_of_other_projects_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"qk_nope_head_dim=16: no such argument: .*--qk-head-dim"):
        to_argv(compose(["model=micro", "qk_nope_head_dim=16"]))


def test_a_deviation_is_refused_unless_allowed() -> None:
    there = Surroundings(world_size=4, on_cpu=True)
    with pytest.raises(RefusedArgument, match=r"--weight-decay 0\.3 contradicts DeepSeek-V3"):
        complete(to_megatron_argv(compose(["weight_decay=0.3"])), parser(), around=there)
    allowed = ["weight_decay=0.3", "allow_deviation=[weight_decay]"]
    complete(to_megatron_argv(compose(allowed)), parser(), around=there)


def test_command_is_the_same_training() -> None:
    overrides = [
        "model=tiny",
        "layout=cpu_pp2_ep2",
        "train_iters=50",
        "pipeline_model_parallel_layout=Et*3|tmL",
    ]
    cfg = compose(overrides)
    words = shlex.split(to_command(cfg))
    at = words.index("dsv3_megatron.train")
    assert words[:at] == ["torchrun", "--nnodes", "1", "--nproc-per-node", "4", "-m"]
    assert words[at + 1 :] == to_argv(cfg)
    assert words[at + 1 : at + 3] == ["--device", "cpu"]
    assert "--spec dsv3" in to_command(cfg)


def test_command_for_many_nodes() -> None:
    command = to_command(compose(["model=v3_671b", "layout=pp16_ep64"]))
    assert command.startswith("torchrun --nnodes 256 --nproc-per-node 8 --rdzv-backend c10d ")
    assert "--device" not in shlex.split(command)
