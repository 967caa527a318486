"""What a launch line says and a plan leaves out: said by name, or refused where it makes another model."""

import json

import pytest

from dsv3_megatron.plan import __main__ as command
from dsv3_megatron.plan import search
from dsv3_megatron.plan.__main__ import planned_of
from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.confidence import confidence
from dsv3_megatron.plan.options import parse
from tests.plan.test_launch import CLUSTER, line


def planned(*words: str, gpu: str = "h100"):
    return planned_of(parse(["--launch", line(*words), f"gpu={gpu}", "load_imbalance=1"]))


@pytest.mark.parametrize(
    "words, said",
    [
        ("--optimizer sgd", "optimizer=sgd, planned as adam"),
        ("--moe-expert-capacity-factor 1.5", "planned as none dropped"),
        ("--tp-comm-overlap", "tp_comm_overlap=True"),
        ("--window-size 128,0", "window_size=(128, 0), planned as left out"),
        ("--num-distributed-optimizer-instances 2", "num_distributed_optimizer_instances=2, planned as 1"),
        ("--use-precision-aware-optimizer --main-params-dtype fp16", "main_params_dtype=float16"),
        ("--no-bias-swiglu-fusion", "bias_swiglu_fusion=False"),
        ("--disable-fp8-wgrad", "fp8_wgrad=False"),
    ],
)
def test_what_is_not_planned_is_outside_of_what_was_compared(words: str, said: str) -> None:
    plain, other = planned(), planned(*words.split())
    assert confidence(plain.job, plain.gpu).domain
    found = confidence(other.job, other.gpu)
    assert not found.domain and said in str(found)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--experimental-attention-variant dsa", "experimental_attention_variant=dsa"),
        ("--moe-latent-size 1024", "moe_latent_size=1024"),
        ("--hybrid-layer-pattern MEME", "hybrid_layer_pattern=MEME"),
        ("--cpu-offloading-num-layers 2", "cpu_offloading_num_layers=2"),
        ("--fp8-recipe mxfp8", "h100 has no MXFP8"),
        ("--attention-backend local", "use --attention-backend unfused"),
        ("--use-megatron-fsdp", "use_megatron_fsdp=true: the planner knows"),
    ],
)
def test_another_model_and_what_a_gpu_does_not_have(
    words: str, expected: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        command.main(["--launch", line(*words.split()), "gpu=h100"])
    assert expected in capsys.readouterr().err


def test_a_model_without_latent_attention_is_refused_by_that_name(capsys: pytest.CaptureFixture) -> None:
    """And not by what Megatron wants of its rotary embedding."""
    with pytest.raises(SystemExit):
        command.main(["--launch", line().replace("--multi-latent-attention", ""), "gpu=h100"])
    assert "multi_latent_attention is off" in capsys.readouterr().err


def test_both_moments_and_either_name_of_the_sms_count() -> None:
    aware = ("--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16")
    assert planned(*aware).job.precision.moment == 3
    assert planned(*aware, "--exp-avg-sq-dtype", "bf16").job.precision.moment == 2
    assert planned("--moe-flex-dispatcher-num-sms", "8").job.communication_sms == 8


def test_weight_gradients_wait_where_the_line_says_so() -> None:
    words = line().replace("--delay-wgrad-compute", "")
    found = planned_of(parse(["--launch", words, "gpu=h100", "load_imbalance=1"]))
    assert not found.job.layout.wgrad_apart and planned().job.layout.wgrad_apart
    assert "without delay_wgrad_compute" in str(confidence(found.job, found.gpu))


def test_a_line_that_forces_an_even_load() -> None:
    words = ["--launch", line("--moe-router-force-load-balancing"), "gpu=h100"]
    assert planned_of(parse(words)).job.load_imbalance == 1
    for said in (LOAD_IMBALANCE, 1.2):
        assert planned_of(parse([*words, f"load_imbalance={said}"])).job.load_imbalance == said
    assert planned_of(parse(["--launch", line(), "gpu=h100"])).job.load_imbalance == LOAD_IMBALANCE


def test_the_clusters_tokenizer_is_not_asked_for() -> None:
    """Nor for the size of its vocabulary, in a line of ours and in one of Megatron's."""
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/of/the/cluster"]
    words += [
        "--data-path",
        "/of/the/cluster",
        "--global-batch-size",
        "8",
        "--micro-batch-size",
        "1",
        "--bf16",
    ]
    ours = " ".join(["torchrun --nproc-per-node 8 -m dsv3_megatron.train --spec dsv3", *words])
    assert planned_of(parse(["--launch", ours, "gpu=h100"])).job.num_microbatches == 1
    text = line().replace("--vocab-size 129280", "")
    sizes = planned_of(parse(["--launch", text, "gpu=h100"])).job.sizes
    assert "--tokenizer-type HuggingFaceTokenizer" in text and sizes.padded_vocab_size == 129_280


def test_the_spec_of_other_layers_is_not_looked_for() -> None:
    found = planned("--spec", "their.layers", "spec_of_them")
    assert found.job == planned().job
    assert "--spec their.layers spec_of_them: layers are planned by the line's sizes" in found.notes


def test_what_was_left_out_is_said_beside_json(capsys: pytest.CaptureFixture) -> None:
    command.main(["--launch", line("--no-such-option", "3"), "gpu=h100", "nodes=64", "output=json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["step_s"] > 0 and len(out.splitlines()) == 1
    assert "--no-such-option 3" in err and "nodes=64, in place of the line's 128" in err


@pytest.mark.parametrize("word", ["best=0.5", "whatif=all", "tokens=1e12", "software.te=2.9"])
def test_the_search_refuses_what_it_does_not_take(word: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        search.main([*CLUSTER, "cluster=h800_2048", word])
    assert word.partition("=")[0].partition(".")[0] in capsys.readouterr().err


def test_the_recipe_of_a_proxy_is_no_json(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.main([*CLUSTER, "cluster=h800_2048", "--proxy", "output=json"])
    out, err = capsys.readouterr()
    assert not out and "--proxy with output=json" in err


def test_a_schedule_of_ours_is_planned_with_deepseeks_attention() -> None:
    """As is said where another one is asked for; Megatron's own schedule is planned with it."""
    words = [*CLUSTER, "cluster=h800_2048", "attention_backend=unfused"]
    ours, megatrons = (planned_of(parse([*words, f"schedule={name}"])) for name in ("dualpipe", "1f1b"))
    assert any(said.startswith("attention_backend=unfused") for said in ours.job.unplanned)
    assert not confidence(ours.job, ours.gpu).domain
    assert not megatrons.job.unplanned and not megatrons.job.software.fused_attention
