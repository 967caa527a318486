"""Lines for made-up scripts with other projects' habits: the same model, nothing lost, accepted by our own checks."""

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.adopt.__main__ import command, launches_of, report
from dsv3_megatron.adopt.line import Adopted, adopt
from dsv3_megatron.adopt.translate import Launch, launch_of
from dsv3_megatron.arguments import megatron_parser
from dsv3_megatron.arguments.command_line import parse
from dsv3_megatron.arguments.complete import complete
from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.conf.argv import to_megatron_argv
from dsv3_megatron.conf.compose import compose

SCRIPTS = Path(__file__).parent / "scripts"
PAI = ["dsw", "A3B", "1e-5", "1", "4", "2", "/ck"]


@pytest.fixture(scope="module")
def parser() -> Any:
    return megatron_parser()


def adopted(parser: Any, name: str, *arguments: str, **given: str) -> tuple[Launch, Adopted]:
    launches, _ = launches_of(SCRIPTS / name, arguments, given)
    assert len(launches) == 1
    return launches[0][1], adopt(launches[0][1], parser)


def arguments_of(parser: Any, line: Adopted) -> Namespace:
    """What a run with the line would have; raises where it would be refused."""
    return parse(parser, complete(line.words, parser, around=line.around))


def words(parser: Any, text: str) -> Adopted:
    launch = launch_of(
        ["torchrun", "--nnodes", "1", "--nproc_per_node", "8", "pretrain.py", *shlex.split(text)]
    )
    assert launch is not None
    return adopt(launch, parser)


# The released configurations' own numbers, typed from their config.json.
V3 = {
    "num_layers": 61, "hidden_size": 7168, "ffn_hidden_size": 18432, "num_attention_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "num_experts": 256,
    "moe_layer_freq": [0] * 3 + [1] * 58, "moe_ffn_hidden_size": 2048, "moe_shared_expert_intermediate_size": 2048,
    "moe_router_topk": 8, "moe_router_num_groups": 8, "moe_router_group_topk": 4,
    "moe_router_topk_scaling_factor": 2.5, "layernorm_epsilon": 1e-6, "rotary_base": 10000,
    "moe_router_score_function": "sigmoid", "untie_embeddings_and_output_weights": True, "add_bias_linear": False,
}  # fmt: skip
MOONLIGHT = V3 | {
    "num_layers": 27, "hidden_size": 2048, "ffn_hidden_size": 11264, "num_attention_heads": 16, "q_lora_rank": None,
    "num_experts": 64, "moe_layer_freq": [0] + [1] * 26, "moe_ffn_hidden_size": 1408,
    "moe_shared_expert_intermediate_size": 2816, "moe_router_topk": 6, "moe_router_num_groups": 1,
    "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.446, "layernorm_epsilon": 1e-5,
    "rotary_base": 50000, "rope_type": "rope", "rotary_scaling_factor": 1.0, "mtp_num_layers": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rotary_scaling_factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}


def has(args: Namespace, expected: dict[str, Any]) -> None:
    different = {name: getattr(args, name) for name in expected if getattr(args, name) != expected[name]}
    assert different == {}


def test_moonlight_stays_moonlight(parser: Any) -> None:
    _, line = adopted(parser, "pai_like.sh", *PAI)
    assert line.problems == () and line.around.world_size == 8 and not line.assumed
    args = arguments_of(parser, line)
    has(args, MOONLIGHT)
    assert (args.lr, args.train_iters, args.tokenizer_model, args.load) == (1e-5, 3814, "/ck", "/ck")
    assert args.moe_aux_loss_coeff == [1e-3] and args.allow_deviation == ["moe_aux_loss_coeff"]


def test_v3_in_rocms_words(parser: Any) -> None:
    _, line = adopted(parser, "rocm_like.sh", DATA_PREFIX="/data/x")
    assert line.problems == () and line.around.world_size == 64
    args = arguments_of(parser, line)
    has(args, V3 | YARN | {"mtp_num_layers": None, "tokenizer_model": "/models/v3", "data_path": ["/data/x"]})
    assert args.decoder_last_pipeline_num_layers == 5 and args.fp8 is None


def test_eight_bits_become_this_recipe(parser: Any) -> None:
    _, line = adopted(parser, "rocm_like.sh", DATA_PREFIX="/data/x", FP8="1", RECOMPUTE="full")
    assert line.problems == ()
    args = arguments_of(parser, line)
    # What `--fp8-recipe dsv3` is in Megatron's options: block scaling in E4M3, with quantizers of its own.
    assert (args.fp8, args.fp8_recipe) == ("e4m3", "blockwise") and "dsv3" in args.fp8_quantizer_factory
    assert args.recompute_granularity == "full" and args.recompute_num_layers == 1


def test_empty_layers_become_a_layout(parser: Any) -> None:
    _, line = adopted(parser, "mindspeed_like.sh")
    assert line.problems == () and line.around == Surroundings(32, 8, files_here=False)
    args = arguments_of(parser, line)
    sizes = {"num_layers": 14, "moe_layer_freq": [0] + [1] * 13, "moe_shared_expert_intermediate_size": 1024}
    has(args, sizes | YARN | {"num_experts": 64, "hidden_size": 2048, "mtp_num_layers": None})
    # 16 layers on 4 stages, of which the last two are empty.
    assert args.pipeline_model_parallel_layout.replace("t*4", "tttt") == "Etttt|(tttt|)*2ttL"
    assert args.eval_iters == 0 and args.expert_tensor_parallel_size == 1 and args.adam_beta2 == 0.999


def test_a_model_file(parser: Any) -> None:
    _, line = adopted(parser, "zoo_like.yaml", SEQ_LEN="64", MBS="1", GBS="4", TP="2")
    assert line.problems == ()
    args = arguments_of(parser, line)
    expected = {"num_layers": 4, "seq_length": 64, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    has(args, expected | {"moe_router_num_groups": 1, "moe_router_group_topk": 1, "mscale_all_dim": 0.0})
    has(args, {"rope_type": "yarn", "moe_router_topk_scaling_factor": 1.0, "train_samples": 1000})
    _, line = adopted(parser, "zoo_like.yaml")
    assert [p for p in line.problems if "--set SEQ_LEN=VALUE" in p] and len(line.problems) == 4


@pytest.mark.parametrize(
    ("name", "arguments", "given"),
    [
        ("mindspeed_like.sh", [], {}),
        ("pai_like.sh", PAI, {}),
        ("rocm_like.sh", [], {"DATA_PREFIX": "x"}),
        ("zoo_like.yaml", [], {"SEQ_LEN": "64", "MBS": "1", "GBS": "4", "TP": "1"}),
    ],
)
def test_every_option_has_its_line_and_a_reason(
    name: str, arguments: list[str], given: dict[str, str], parser: Any
) -> None:
    launch, line = adopted(parser, name, *arguments, **given)
    shown = [step.option.split()[0] for step in line.steps if step.kind != "added"]
    assert shown == list(launch.options)
    assert all(step.why for step in line.steps if step.kind != "kept")
    page = "\n".join(report("here", launch, line, []))
    assert all(option in page for option in launch.options)
    # The command is what was checked, and a shell reads it back.
    assert shlex.split(command(line).replace("\\\n", ""))[-len(line.words) :] == list(line.words)


def test_what_is_filled_in_otherwise_is_said(parser: Any) -> None:
    """Every argument of the adopted run that is not what Megatron would have had is on the page."""
    launch, line = adopted(parser, "rocm_like.sh", DATA_PREFIX="x")
    before = parse(parser, [])
    after = arguments_of(parser, line)
    page = "\n".join(report("here", launch, line, []))
    given = {word for word in line.words if word.startswith("--")}
    for action in parser._actions:
        value = getattr(after, action.dest, None)
        if value != getattr(before, action.dest, None) and not given.intersection(action.option_strings):
            assert any(option in page for option in action.option_strings), action.dest


GOOD = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --q-lora-rank 16 --kv-lora-rank 16 "
    "--qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16 --multi-latent-attention --qk-layernorm --swiglu "
    "--normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --untie-embeddings-and-output-weights "
    "--position-embedding-type rope --num-experts 8 --moe-ffn-hidden-size 32 --moe-layer-freq [0]*1+[1]*3 "
    "--moe-shared-expert-intermediate-size 32 --moe-router-topk 2 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-load-balancing-type seq_aux_loss --mock-data --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 8 --train-iters 3 --eval-iters 0 "
    "--tokenizer-type NullTokenizer --vocab-size 100 --lr 1e-4"
)


def test_the_good_line_has_no_problem(parser: Any) -> None:
    line = words(parser, GOOD)
    assert line.problems == ()
    arguments_of(parser, line)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("--moe-router-score-function softmax", "--moe-router-score-function is softmax in the script"),
        ("--normalization LayerNorm", "--normalization is LayerNorm"),
        ("--enable-dsa-indexer", "another model"),
        ("--lora-r 8", "no LoRA"),
        ("--train-mode finetune", "--sft-data"),
        ("--schedules-method gpipe", "the schedules here are"),
        ("--tensor-model-parallel-size 3", "--tensor-model-parallel-size"),
        ("--hidden-size", "its value is empty"),
        ("--global-batch-size 9", "--global-batch-size 9"),
        ("--lr ${LR}", "--set LR=VALUE"),
        ("--lr ${3}", "argument 3 of the script"),
    ],
)
def test_what_cannot_be_had_is_a_problem(more: str, problem: str, parser: Any) -> None:
    line = words(parser, f"{GOOD} {more}")
    assert any(problem in text for text in line.problems), line.problems


@pytest.mark.parametrize(
    ("more", "option", "kind"),
    [
        ("--sequence-parallel", "--sequence-parallel", "left out"),  # one tensor-parallel rank
        ("--use-flash-attn", "--use-flash-attn", "left out"),
        ("--transformer-impl local", "--transformer-impl", "left out"),
        ("--reset-position-ids", "--reset-position-ids", "left out"),
        ("--moe-router-fusion", "--moe-router-fusion", "left out"),
        ("--moe_router_topk=2", "--moe_router_topk", "kept"),
        ("--rotary-scale-factor 30", "--rotary-scale-factor", "becomes"),
        ("--fp16", "--fp16", "becomes"),
        ("--moe-aux-loss-coeff 0.01", "--moe-aux-loss-coeff", "kept"),
        ("--no-such-option-anywhere 3", "--no-such-option-anywhere", "unknown"),
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size", "kept"),
        ("--recompute-num-layers 1", "--recompute-num-layers", "left out"),
        ("--freeze-all-layers", "--freeze-all-layers", "left out"),
    ],
)
def test_what_becomes_of_single_options(more: str, option: str, kind: str, parser: Any) -> None:
    line = words(parser, f"{GOOD} {more}")
    step = next(s for s in line.steps if s.option.startswith(option) and s.kind != "added")
    assert step.kind == kind, step
    assert line.problems == () and (step.why or kind == "kept")
    arguments_of(parser, line)


def test_tensor_parallelism_gets_what_it_needs(parser: Any) -> None:
    line = words(parser, f"{GOOD} --tensor-model-parallel-size 2")
    assert any(s.kind == "added" and s.words == ("--sequence-parallel",) for s in line.steps)
    assert command(line).startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun ")
    assert command(words(parser, GOOD)).startswith("CUDA_DEVICE_MAX_CONNECTIONS=32 torchrun ")


def test_the_job_is_the_smallest_that_fits_where_it_is_not_known(parser: Any) -> None:
    launch = launch_of(["pretrain.py", *shlex.split(f"{GOOD} --expert-model-parallel-size 4")])
    assert launch is not None
    line = adopt(launch, parser)
    assert line.assumed and line.around.world_size == 4


@pytest.mark.parametrize("model", ["v3_671b", "v3_16b"])
def test_our_own_lines_are_adopted_as_they_are(model: str, parser: Any) -> None:
    """A whole command line of ours, every argument spelled out: nothing is a problem, and the run is the same."""
    cfg = compose(
        [f"model={model}", "layout=pp16_ep16", "cluster=h100_256", "schedule=1f1b", "mock_data=true"]
    )
    ours = complete(to_megatron_argv(cfg), parser, around=Surroundings(world_size=256, files_here=False))
    launch = launch_of(
        ["torchrun", "--nnodes", "32", "--nproc-per-node", "8", "-m", "dsv3_megatron.train", *ours]
    )
    assert launch is not None
    line = adopt(launch, parser)
    assert line.problems == ()
    assert vars(arguments_of(parser, line)) == vars(parse(parser, ours))


def test_tools_are_no_trainers() -> None:
    assert launch_of(["python", "convert_ckpt.py", "--load-dir", "a", "--save-dir", "b"]) is None
    assert launch_of(["python", "-m", "pip", "install", "x"]) is None
    assert launch_of(["srun", "python", "-u", "pretrain_gpt.py", "--lr", "1"]) is not None


def test_what_is_given_must_change_something(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "PP=1\nTP=${TP:-2}\nTP=$((TP * 2))\n"
        "torchrun --nnodes ${NODES:-1} --nproc-per-node gpu pretrain_gpt.py --lr 1 --pp $PP --tp $TP\n"
    )
    for name, value, said in (
        ("PP", "4", r"sets PP itself, so that PP=4 changes nothing"),
        ("EP", "4", r"has no variable EP; leave EP=4 out"),
        ("NODES", "many", r"train\.sh:4: --nnodes many: is no whole number"),
    ):
        with pytest.raises(RefusedArgument, match=said):
            launches_of(script, [], {name: value})
    for given in ({"TP": "4"}, {"NODES": "1"}, {"NODES": "2:4"}, {"PP": "1"}, {"NODES": "${SLURM_NNODES}"}):
        launches_of(script, [], given)


def test_no_trainer_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    for text in ("echo hello\n", "python prepare.py --input x\n", "'"):
        script.write_text(text)
        with pytest.raises(RefusedArgument, match=r"script\.sh"):
            launches_of(script, [], {})
    with pytest.raises(RefusedArgument, match="no such file"):
        launches_of(tmp_path / "nowhere.sh", [], {})
