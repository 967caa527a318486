"""Groups, overrides, and what is said of wrong ones."""

import itertools

import pytest

from dsv3_megatron.conf import ConfigError, compose, groups, to_argv, training_layouts
from dsv3_megatron.conf.check import data_parallel_size, world_size

# deepseek-v3.md §1, written down here a second time.
V3 = {
    "num_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "ffn_hidden_size": 18432,
    "moe_ffn_hidden_size": 2048,
    "num_experts": 256,
    "moe_shared_expert_intermediate_size": 1 * 2048,
    "moe_router_topk": 8,
    "moe_router_num_groups": 8,
    "moe_router_group_topk": 4,
    "moe_router_topk_scaling_factor": 2.5,
    "vocab_size": 129280,
    "norm_epsilon": 1e-6,
    "rotary_base": 10000,
    "init_method_std": 0.006,
    "mtp_num_layers": 1,
}


def test_v3_671b_is_the_published_model() -> None:
    cfg = compose(["model=v3_671b", "layout=pp16_ep64"])
    assert {name: cfg[name] for name in V3} == V3
    assert eval(cfg.moe_layer_freq) == [0] * 3 + [1] * 58
    assert cfg.pipeline_model_parallel_layout == "Et*4|(t*4|)*14tmL"


def test_published_layout() -> None:
    cfg = compose(["model=v3_671b", "layout=pp16_ep64"])
    assert (cfg.pipeline_model_parallel_size, cfg.expert_model_parallel_size) == (16, 64)
    assert cfg.tensor_model_parallel_size == 1
    assert world_size(cfg) == 2048 and data_parallel_size(cfg) == 128
    # 120 microbatches of one sequence per data-parallel rank and step.
    assert cfg.global_batch_size // (cfg.micro_batch_size * data_parallel_size(cfg)) == 120
    assert cfg.seq_length == 4096 and cfg.bf16 is True


def test_pretraining_constants() -> None:
    cfg = compose(["model=v3_671b", "layout=pp16_ep64"])
    assert float(cfg.train_tokens) == 14.8e12 and cfg.batch_ramp == [3072, 768]
    assert (cfg.global_batch_size, cfg.seq_length) == (15360, 4096)
    assert (cfg.lr, cfg.min_lr, cfg.last_lr) == (2.2e-4, 2.2e-5, 7.3e-6)
    assert cfg.recompute_modules == ["layernorm", "mla_up_proj"]
    assert (cfg.adam_beta1, cfg.adam_beta2, cfg.weight_decay, cfg.clip_grad) == (0.9, 0.95, 0.1, 1.0)
    assert (cfg.moe_router_bias_update_rate, cfg.moe_aux_loss_coeff, cfg.mtp_loss_scaling_factor) == (
        1e-3,
        1e-4,
        0.3,
    )


def test_a_layout_brings_cluster_and_precision_and_the_command_line_wins() -> None:
    assert compose(["layout=pp8_ep8", "model=v3_16b"]).cluster.name == "h100_256"
    given = ["cluster=h800_2048", "precision=fp32", "recipe=small", "global_batch_size=512"]
    cfg = compose(["layout=pp8_ep8", "model=v3_16b", *given])
    assert cfg.cluster.name == "h800_2048" and "bf16" not in cfg and cfg.seq_length == 128


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=v3_67b", "model=v3_67b: no such model; did you mean 'v3_671b'? Available: deepseek"),
        ("layout=pp16_ep46", "did you mean 'pp16_ep64'?"),
        ("recipe=v3_pretrian", "did you mean 'v3_pretrain'?"),
        ("cluster.node=4", "cluster.node=4: no such entry; did you mean 'nodes'?"),
        ("custer.nodes=4", "no section 'custer'; did you mean 'cluster'?"),
        ("megatron.lr=1", "no section 'megatron'. Available: cluster"),
        ("train_iters", "'train_iters' is no override: write NAME=VALUE"),
        ("lr=1e-3,1e-4", "asks for several values"),
        ("pipeline_model_parallel_layout=E(t|)*3L", "quote values with special characters"),
        ("cluster.nodes=three", "cluster.nodes=three: a positive whole number is needed"),
        (
            "pipeline_model_parallel_size=0",
            "pipeline_model_parallel_size=0: a positive whole number is needed",
        ),
        ("num_experts=7", "expert_model_parallel_size=2 does not divide num_experts=7"),
        ("cluster.gpus_per_node=0", "cluster.gpus_per_node=0: a positive whole number is needed"),
        (
            "global_batch_size=6",
            "global_batch_size=6 is not a multiple of micro_batch_size=2 × 2 data-parallel ranks: use a multiple of 4",
        ),
        ("pipeline_model_parallel_size=5", "5 stages are too many for num_layers=4"),
        ("cluster.gpus_per_node=6", "cluster=laptop_cpu has 6 processes, which the layout's 4"),
        (
            "tensor_model_parallel_size=3",
            "tensor_model_parallel_size=3 does not divide num_attention_heads=4",
        ),
        ("cluster=laptop_gpu", "did you mean 'laptop_cpu'?"),
    ],
)
def test_wrong_overrides_name_the_nearest_valid_one(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["layout=cpu_single", "placement.last_stage_extra=3"],
            "=3 would do nothing: the pipeline has one stage",
        ),
        (["layout=cpu_single", "+placement.last_stage_extra=0"], "=0 would do nothing"),
        (
            ["pipeline_model_parallel_layout='Ett|ttmL'", "placement.last_stage_extra=1"],
            "=1 would do nothing: the stages are those of pipeline_model_parallel_layout=Ett|ttmL",
        ),
        (["placement.last_stage_extra=x"], "=x: a whole number of layers is needed"),
        (["placement.last_stage_extra=-1"], "=-1: a whole number of layers is needed"),
        (["placement.last_stage_extra=50"], "=50: num_layers=4 over 2 stages can pay 4 at most"),
    ],
)
def test_a_placement_that_no_layout_comes_from_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(more)
    assert str(error.value).startswith("placement.last_stage_extra") and message in str(error.value)


def test_a_corpus_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"corpus\.dir would do nothing"):
        compose(["corpus.dir=x"])
    assert compose(["data=indexed", "corpus.dir=x"]).tokenizer_model == "x"


def test_a_placement_that_a_layout_comes_from() -> None:
    """The control: the same words where stages are dealt out; what a layout's file names may be more than is paid."""
    layouts = [
        compose([f"placement.last_stage_extra={extra}"]).pipeline_model_parallel_layout for extra in (0, 2)
    ]
    assert layouts == ["Ett|ttmL", "Et*3|tmL"]
    assert compose(
        ["layout=pp8_ep8", "num_layers=8", "num_experts=8", "global_batch_size=256"]
    )  # whose file says 3
    assert compose(["~placement"]).pipeline_model_parallel_layout == layouts[0]


def test_context_parallel_cuts_the_sequence_in_pairs() -> None:
    with pytest.raises(
        ConfigError, match="seq_length=130 is not a multiple of 2 × context_parallel_size = 4"
    ):
        compose(["layout=cpu_single", "context_parallel_size=2", "seq_length=130"])


def test_processes_that_torchrun_started() -> None:
    assert world_size(compose([], processes=8)) == 8
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 4"):
        compose([], processes=3)
    with pytest.raises(
        ConfigError, match="cluster=h100_256 has 32 × 8 processes, but torchrun has started 8"
    ):
        compose(["model=v3_16b", "layout=pp8_ep8"], processes=8)
    assert world_size(compose(["model=v3_16b", "layout=pp8_ep8", "cluster.nodes=8"], processes=64)) == 64


def test_an_override_displaces_its_alternatives() -> None:
    cfg = compose(["train_samples=1000", "lr_warmup_iters=5"])
    assert cfg.train_iters is None and cfg.train_samples == 1000
    assert cfg.lr_warmup_fraction is None and cfg.lr_warmup_iters == 5
    assert compose([]).lr_warmup_fraction == 0.1


def test_train_iters_and_a_batch_size_displace_parts_of_the_schedules_by_tokens() -> None:
    recipe = ["model=v3_671b", "layout=pp16_ep64"]
    cfg = compose([*recipe, "train_iters=1000"])
    assert (cfg.train_tokens, cfg.batch_ramp, cfg.last_lr) == (None, None, None) and cfg.train_iters == 1000
    cfg = compose([*recipe, "global_batch_size=1024"])
    assert float(cfg.train_tokens) == 14.8e12 and cfg.batch_ramp is None and cfg.last_lr == 7.3e-6
    assert compose([*recipe, "global_batch_size=6144", "batch_ramp=[2048,512]"]).batch_ramp == [2048, 512]


def test_virtual_stages_become_a_layer_layout() -> None:
    cfg = compose(["num_virtual_stages_per_pipeline_rank=2"])
    assert cfg.pipeline_model_parallel_layout == "Et|(t|)*2tmL"
    assert cfg.num_virtual_stages_per_pipeline_rank is None


def test_a_schedule_is_one_option() -> None:
    assert "--pipeline-schedule" not in to_argv(compose([]))
    for schedule in ("zb1p", "dualpipe", "dualpipev", "zigzag"):
        argv = to_argv(compose([f"schedule={schedule}"]))
        assert argv[argv.index("--pipeline-schedule") + 1] == schedule
    # DualPipeV places two stages on each of the two ranks.
    assert compose(["schedule=dualpipe"]).pipeline_model_parallel_layout.count("|") == 1
    assert compose(["schedule=dualpipev"]).pipeline_model_parallel_layout == "Et|(t|)*2tmL"
    assert compose(["schedule=zigzag"]).pipeline_model_parallel_layout == "Et|(t|)*2tmL"
    twice = compose(["schedule=zigzag", "pipeline_zigzag_chunks=4", "num_layers=8"])
    assert twice.pipeline_model_parallel_layout.count("t") == 3 and "--pipeline-zigzag-chunks" in to_argv(
        twice
    )
    with pytest.raises(ConfigError, match=r"pipeline_zigzag_chunks=3: .*; use 2 or 4"):
        compose(["schedule=zigzag", "pipeline_zigzag_chunks=3"])  # whatever the number of layers


def test_a_given_layer_layout_stays() -> None:
    assert compose(["pipeline_model_parallel_layout=Et|tttmL"]).pipeline_model_parallel_layout == "Et|tttmL"


# Which clusters a layout runs on as it is, by the arithmetic of its name.
LARGE, SMALL = {"h800_2048", "h100_1024"}, {"h100_256", "h200_256", "gb200_256"}
FITS = {
    "pp16_ep64": LARGE,
    "pp16_ep64_cp8": LARGE,
    "pp16_ep64_cp32": LARGE,
    "ep32_pp16": LARGE,
    "pp16_ep16": LARGE | SMALL,
    "pp8_ep8": LARGE | SMALL,
}


@pytest.mark.parametrize(
    "all_models", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one model", "all models"]
)
def test_every_model_with_every_layout_and_cluster(all_models: bool) -> None:
    """All of them: composed, or refused for a reason that names both sides."""
    options = groups()
    for layout, cluster in itertools.product(training_layouts(), options["cluster"]):
        one = "micro" if layout.startswith("cpu_") or cluster == "laptop_cpu" else "v3_671b"
        for model in options["model"] if all_models else [one]:
            overrides = [f"model={model}", f"layout={layout}", f"cluster={cluster}", "global_batch_size=4096"]
            large = model not in ("micro", "tiny")
            fits_cluster = cluster == "laptop_cpu" or layout.startswith("cpu_") or cluster in FITS[layout]
            fits_model = layout.startswith("cpu_") or large
            if fits_cluster and fits_model:
                cfg = compose(overrides)
                assert cfg.cluster.name == cluster
                assert world_size(cfg) % cfg.pipeline_model_parallel_size == 0
            else:
                with pytest.raises(
                    ConfigError, match=r"too many for num_layers|do not divide|does not divide"
                ):
                    compose(overrides)


@pytest.mark.parametrize("data", groups()["data"])
@pytest.mark.parametrize("precision", groups()["precision"])
@pytest.mark.parametrize("recipe", groups()["recipe"])
def test_every_recipe_with_every_precision_and_data(recipe: str, precision: str, data: str) -> None:
    cfg = compose([f"recipe={recipe}", f"precision={precision}", f"data={data}"])
    lengths = {"small": 128, "v3_pretrain": 4096, "longctx_32k": 32768, "longctx_128k": 131072, "sft": None}
    lengths |= {"dpo": None, "grpo": 4096}
    assert cfg.get("seq_length") == lengths[recipe]
    assert cfg.get("bf16") == (None if precision == "fp32" else True)
    assert ("mock_data" in cfg) == (data == "mock")
