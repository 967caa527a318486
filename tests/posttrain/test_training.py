"""Through the real trainer: DPO and GRPO in one process against gradients written out, and in layouts against that.

A micro model with a real tokenizer is saved once; each run takes a step from there.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arguments.lines import MICRO
from tests.harness import DistributedFailure, run_distributed
from tests.parallel.common import join_tensors, relative_difference

SEQ_LENGTH = 64
MODEL = (
    " ".join(MICRO)
    .replace("--mock-data", "")
    .replace("--vocab-size 128", "")
    .replace("--train-iters 3", "")
    .replace("--seq-length 32", "")
    .split()
)
BETA = 0.3
# Nothing moves but by the loss: no balance loss, and routers' biases stand still.
FIXED = "--moe-aux-loss-coeff 0 --allow-deviation moe_aux_loss_coeff --moe-router-bias-update-rate 0"


def shake_routers(model: list[Any]) -> None:
    """Let them choose other experts than those that the engine has just chosen."""
    from dsv3_megatron.specs.router import DSV3Router

    generator = torch.Generator().manual_seed(0)
    for module in model[0].modules():
        if isinstance(module, DSV3Router):
            assert module.expert_bias is not None
            module.expert_bias.add_(0.3 * torch.randn(module.expert_bias.shape, generator=generator))


def train(
    rank: int, world_size: int, words: list[str], by_hand: str = "", shake: bool = False
) -> dict[str, Any]:
    """Gradients by global name before the first update, losses of each step, the rollout, and, for `by_hand`, the
    gradients of a loss written out over single samples.
    """
    from dsv3_megatron.posttrain.install import active
    from dsv3_megatron.posttrain.routes import decoder_routers
    from dsv3_megatron.specs.names import global_names, named_weights
    from dsv3_megatron.specs.router import DSV3Router
    from dsv3_megatron.train import main
    from dsv3_megatron.training import hooks

    found: dict[str, Any] = {"grads": {}, "weights": {}, "losses": [], "replaying": set()}

    def look(where: str, router: Any, inputs: Any) -> None:
        if router.given_experts is not None:
            found["replaying"].add(where)

    def prepare(call: dict[str, Any]) -> None:
        model = call["model"]
        if shake:
            shake_routers(model)
        decoder = {id(router) for chunk in model for router in decoder_routers(chunk).values()}
        for module in (module for chunk in model for module in chunk.modules()):
            if isinstance(module, DSV3Router):
                where = "decoder" if id(module) in decoder else "mtp"
                module.register_forward_pre_hook(partial(look, where))

    def keep(call: dict[str, Any]) -> None:
        if found["grads"]:
            return
        run = active()
        for chunk in call["model"]:
            names = global_names(chunk)
            for local, weight in named_weights(chunk).items():
                if hasattr(weight, "main_grad"):
                    name = names[local]
                    found["grads"][name.name] = (name.shard, weight.main_grad.detach().clone())
        rollout = getattr(run, "rollout", None)
        if rollout is not None:
            found["rollout"] = {
                name: getattr(rollout, name) for name in ("sequences", "advantages", "engine")
            }
        if by_hand:
            model = call["model"][0]
            found["by_hand"] = _by_hand(model, run, by_hand)

    def note(call: dict[str, Any], result: Any) -> None:
        found["losses"].append({name: float(value) for name, value in result[0].items()})
        for chunk in call["model"]:
            names = global_names(chunk)
            for local, weight in named_weights(chunk).items():
                found["weights"][names[local].name] = (names[local].shard, weight.detach().clone())

    hooks.after_validation(
        lambda args: hooks.before_step(prepare)
    )  # after post-training's own: rollouts are there
    hooks.before_update(keep)
    hooks.after_step(note)
    main(words)
    return found


def _by_hand(model: Any, run: Any, method: str) -> dict[str, torch.Tensor]:
    """Gradients of the loss over samples that are run one by one, unpacked, without the trainer's schedule."""
    from dsv3_megatron.specs.names import global_names, unwrap

    inner = unwrap(model)
    names = global_names(model)
    weights = {names[local].name: weight for local, weight in inner.named_parameters()}

    def log_probs(ids: list[int], begin: int) -> torch.Tensor:
        """log π of the tokens from `begin` on."""
        tokens = torch.tensor([ids])
        shape = (1, len(ids) - 1)
        losses = inner(
            tokens[:, :-1],
            torch.arange(len(ids) - 1)[None],
            None,
            labels=tokens[:, 1:],
            loss_mask=torch.zeros(shape),  # without labels Megatron would train the MTP layer
        )
        return -losses[0, begin - 1 :]

    inner.eval()  # no balance loss, no MTP loss, nothing counted
    total: Any = 0.0
    temperature = getattr(run.args, "rollout_temperature", 1.0)
    if method == "grpo":
        run.temperature.on = False
    of_logits = inner.compute_language_model_loss
    inner.compute_language_model_loss = lambda labels, logits: of_logits(labels, logits / temperature)
    if method == "dpo":
        from tests.posttrain.test_preferences import samples

        found = samples(Path(run.args.preference_data))
        pairs = len(found) // 2
        for pair in range(pairs):
            better, worse = (
                log_probs(ids, learnt.index(True)).sum()
                for ids, learnt in (found[2 * pair], found[2 * pair + 1])
            )
            h = (better - better.detach()) - (
                worse - worse.detach()
            )  # the first step: the policy is the reference
            total = total - torch.log(1 / (1 + torch.exp(-BETA * h))) / pairs
    else:
        rollout = run.rollout
        count = int(rollout.response_lengths.sum())
        for ids, begin, advantage in zip(
            rollout.sequences, rollout.prompt_lengths, rollout.advantages.tolist(), strict=True
        ):
            # Ratio 1 and KL 0 at the first step: REINFORCE with the advantages.
            total = total - advantage * log_probs(ids, begin).sum() / count
    kept = {name: weight.main_grad.clone() for name, weight in weights.items()}
    model.zero_grad_buffer()  # layers add up their weights' gradients there, in the backward pass itself
    total.backward()
    grads = {name: weight.main_grad.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.main_grad.copy_(kept[name])
    inner.train()
    inner.compute_language_model_loss = of_logits
    return grads


class Setup:
    """A checkpoint, pairs and prompts, and steps from there in any layout."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        from dsv3_megatron.posttrain.prepare import main as prepare

        self.folder, self.tokenizer = folder, tokenizer
        self.common = ["--spec", "dsv3", "--device", "cpu", *MODEL, "--init-method-std", "0.1"]
        begin = [
            "--mock-data",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            str(tokenizer),
        ]
        begin += [
            "--seq-length",
            str(SEQ_LENGTH),
            "--train-iters",
            "1",
            "--save",
            str(folder / "pretrained"),
            "--save-interval",
            "1",
        ]
        run_distributed(train, world_size=1, timeout=240, init=False, words=[*self.common, *begin])
        records = [
            {
                "prompt": f"name {i}: ",
                "chosen": "yes " * (1 + i % 3) + str(i),
                "rejected": "no " * (1 + i % 4),
            }
            for i in range(24)
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        words = [
            "--input",
            str(folder / "pairs.jsonl"),
            "--tokenizer",
            str(tokenizer),
            "--valid-fraction",
            "0",
        ]
        assert prepare([*words, "--output-dir", str(folder / "pairs"), "--seq-length", str(SEQ_LENGTH)]) == 0
        report = json.loads((folder / "pairs" / "preferences.json").read_text())
        self.rows = report["train"]["rows"]
        lines = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(12)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def dpo(self, batch: int) -> list[str]:
        return [
            *["--posttrain", "dpo", "--micro-batch-size", "1", "--train-iters", "1", "--dpo-beta"],
            str(BETA),
            *("--preference-data", str(self.folder / "pairs"), "--global-batch-size", str(batch)),
        ]

    def grpo(self, reward: str = "parity") -> list[str]:
        words = (
            "--posttrain grpo --samples-per-prompt 4 --prompts-per-rollout 4 --max-response-length 8 "
            "--policy-beta 0.04 --micro-batch-size 1 --global-batch-size 8 --train-iters 1 --seq-length 64 "
            "--rollout-batch 8"
        )
        return [
            *words.split(),
            *("--prompt-data", str(self.folder / "prompts.jsonl"), "--tokenizer-model", str(self.tokenizer)),
            *("--reward", f"tests.posttrain.moody:{reward}"),
        ]

    def run(
        self, words: list[str], more: str = "", world_size: int = 1, by_hand: str = "", shake: bool = False
    ) -> list[dict[str, Any]]:
        start = ["--pretrained-checkpoint", str(self.folder / "pretrained"), *FIXED.split()]
        return run_distributed(
            train,
            world_size=world_size,
            timeout=300,
            init=False,
            words=[*self.common, *start, *words, *more.split()],
            by_hand=by_hand,
            shake=shake,
        )


@pytest.fixture(scope="module")
def setup(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("posttrain"), tokenizer_dir)


def grads(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return join_tensors([rank["grads"] for rank in ranks], "gradient")


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    assert expected.keys() <= got.keys(), expected.keys() - got.keys()
    norm = torch.cat([value.flatten().double() for value in expected.values()]).norm()
    assert norm > 1e-4
    for name, value in got.items():
        if name not in expected or not expected[name].any():
            assert value.double().norm() <= bound * norm, name  # the MTP layer, experts without a token
            continue
        assert relative_difference(value, expected[name]) < bound, (
            name,
            relative_difference(value, expected[name]),
        )


# DPO


def test_dpos_gradient_is_that_of_the_pairs_one_by_one(setup: Setup) -> None:
    (rank,) = setup.run(setup.dpo(setup.rows), by_hand="dpo")
    assert_same(grads([rank]), rank["by_hand"])
    (losses,) = rank["losses"]
    assert losses["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert losses["margin"] == pytest.approx(0, abs=1e-5) and losses["kl"] == pytest.approx(0, abs=1e-5)


DPO_LAYOUTS = [
    ("1f1b", 2, 2, 1, ""),
    ("1f1b", 2, 1, 2, ""),
    ("zb1p", 4, 2, 2, ""),
    ("dualpipe", 4, 2, 2, ""),
    ("dualpipev", 2, 2, 1, ""),
    ("zigzag", 2, 2, 1, ""),
    ("1f1b", 2, 2, 1, "--num-virtual-stages-per-pipeline-rank 2"),
    # The vocabulary is filled up to the same size as without tensor parallelism.
    ("1f1b", 2, 1, 1, "--tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 64"),
    ("dualpipe", 4, 2, 2, "--dpo-reference live"),
    ("dualpipe", 2, 2, 1, "--posttrain-mtp-loss"),
]


def layout_words(schedule: str, pp: int, ep: int) -> str:
    words = f" --pipeline-model-parallel-size {pp} --expert-model-parallel-size {ep}"
    return words + (f" --pipeline-schedule {schedule}" if schedule != "1f1b" else "")


@pytest.mark.slow
@pytest.mark.parametrize("schedule, world_size, pp, ep, words", DPO_LAYOUTS)
def test_dpo_in_layouts(schedule: str, world_size: int, pp: int, ep: int, words: str, setup: Setup) -> None:
    batch = setup.rows // 8 * 8
    assert batch
    mtp = "--posttrain-mtp-loss" if "mtp" in words else ""
    whole = setup.run(setup.dpo(batch), mtp)
    split = setup.run(setup.dpo(batch), words + layout_words(schedule, pp, ep), world_size)
    assert_same(grads(split), grads(whole))
    found, expected = split[-1]["losses"][0], whole[0]["losses"][0]
    for losses in (found, expected):
        del losses["accuracy"]  # the policy is the reference: which answer leads is a matter of rounding
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_dpo_learns_and_its_reference_is_kept(setup: Setup, tmp_path: Path) -> None:
    """Twelve steps with a checkpoint after six: margin and accuracy rise, and the run that goes on is the same."""
    words = setup.dpo(4)
    fixed = "--train-iters 12 --preference-epochs 100 --lr 1e-3 --lr-decay-style constant --save-interval 6"
    words = [*words[: words.index("--train-iters")], *words[words.index("--train-iters") + 2 :]]
    (straight,) = setup.run([*words, "--save", str(tmp_path / "a"), "--load", str(tmp_path / "a")], fixed)
    first, last = straight["losses"][0], straight["losses"][-1]
    assert last["margin"] > first["margin"] + 0.1 and last["accuracy"] > 0.9 and last["loss"] < 0.6
    journal = [json.loads(line) for line in (tmp_path / "a" / "posttrain.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in journal] == list(range(1, 13))
    assert {"margin", "accuracy", "kl", "loss"} <= journal[0].keys() and (
        tmp_path / "a" / "posttrain.png"
    ).exists()
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text("6")
    (resumed,) = setup.run([*words, "--save", str(tmp_path / "a"), "--load", str(tmp_path / "a")], fixed)
    for name, (_, weight) in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][name][1]), name
    for file in (setup.folder / "pairs").glob("reference_*.npy"):
        file.unlink()
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text("6")
    with pytest.raises(DistributedFailure, match=r"--dpo-reference cached: .* is gone"):
        setup.run([*words, "--save", str(tmp_path / "a"), "--load", str(tmp_path / "a")], fixed)


# GRPO


@pytest.fixture(scope="module")
def in_one_process(setup: Setup) -> dict[str, Any]:
    """A step of GRPO without parallelism, and the same by hand."""
    (rank,) = setup.run(setup.grpo(), by_hand="grpo")
    return rank


def test_grpos_gradient_is_that_of_the_samples_one_by_one(in_one_process: dict[str, Any]) -> None:
    rank = in_one_process
    assert rank["rollout"]["advantages"].abs().sum() > 1, "a reward that tells samples apart"
    assert_same(grads([rank]), rank["by_hand"])
    (losses,) = rank["losses"]
    assert losses["kl"] == pytest.approx(0, abs=1e-6) and losses["ratio"] == pytest.approx(1, abs=1e-5)
    assert 0 <= losses["engine mismatch"] < 1e-4 and losses["importance weight"] == pytest.approx(1, abs=1e-4)


def assert_same_rollouts(split: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for rank in split:
        assert rank["rollout"]["sequences"] == whole["rollout"]["sequences"]
        torch.testing.assert_close(
            rank["rollout"]["engine"], whole["rollout"]["engine"], rtol=1e-4, atol=1e-5
        )


def test_dualpipe_has_the_rollouts_and_the_gradient_of_one_process(
    in_one_process: dict[str, Any], setup: Setup
) -> None:
    """PP2 × EP2 under DualPipe: the engine runs on copies filled from the ranks' chunks."""
    split = setup.run(setup.grpo(), layout_words("dualpipe", 2, 2), world_size=4)
    assert_same_rollouts(split, in_one_process)
    assert_same(grads(split), grads([in_one_process]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule, world_size, pp, ep, words",
    [
        ("1f1b", 2, 1, 2, ""),
        ("zb1p", 2, 2, 1, ""),
        ("dualpipev", 2, 2, 1, "--policy-reduction sequence"),
        ("zigzag", 2, 2, 1, ""),
        # The vocabulary is filled up to the same size as without tensor parallelism.
        (
            "1f1b",
            2,
            1,
            1,
            "--tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 64",
        ),
    ],
)
def test_grpo_in_layouts(schedule: str, world_size: int, pp: int, ep: int, words: str, setup: Setup) -> None:
    (whole,) = setup.run(setup.grpo(), words if "reduction" in words else "")
    split = setup.run(setup.grpo(), words + layout_words(schedule, pp, ep), world_size)
    assert_same_rollouts(split, whole)
    assert_same(grads(split), grads([whole]))


@pytest.mark.slow
def test_routing_replay_takes_the_engines_experts(setup: Setup) -> None:
    """Routers that would choose otherwise by now: without replay the trainer's numbers are others than the engine's.
    The MTP layer routes by itself.
    """
    mismatch, replaying = {}, {}
    for words in ("", "--routing-replay"):
        (rank,) = setup.run(setup.grpo(), f"{words} --posttrain-mtp-loss", shake=True)
        mismatch[words], replaying[words] = rank["losses"][0]["engine mismatch"], rank["replaying"]
    assert mismatch[""] > 1e-2 and mismatch["--routing-replay"] < 1e-5
    assert replaying == {"": set(), "--routing-replay": {"decoder"}}


@pytest.mark.slow
def test_a_run_survives_rewards_that_raise_hang_die_or_are_no_numbers(setup: Setup, tmp_path: Path) -> None:
    line = setup.grpo("dreadful")
    line[line.index("--train-iters") + 1] = "2"
    line += ["--reward-timeout", "1"]
    (rank,) = setup.run([*line, "--save", str(tmp_path), "--save-interval", "2", "--log-interval", "1"])
    journal = [json.loads(text) for text in (tmp_path / "posttrain.jsonl").read_text().splitlines()]
    assert len(journal) == 2 and all(entry["bad rewards"] > 2 for entry in journal)
    assert all(entry["reward"] < 1 and entry["bad samples"] == 0 for entry in journal)
    assert all(torch.isfinite(weight).all() for _, weight in rank["weights"].values())


@pytest.mark.slow
def test_groups_that_are_all_alike_move_nothing(setup: Setup, tmp_path: Path) -> None:
    """Advantage 0, not NaN: without a KL penalty the gradient is 0."""
    (rank,) = setup.run(
        [*setup.grpo("alike"), "--policy-beta", "0", "--save", str(tmp_path), "--save-interval", "1"]
    )
    (entry,) = [json.loads(text) for text in (tmp_path / "posttrain.jsonl").read_text().splitlines()]
    assert entry["groups alike"] == 1 and entry["reward"] == 0.25 and entry["loss"] == 0
    assert not any(grad.any() for _, grad in rank["grads"].values())


@pytest.mark.slow
def test_at_a_temperature_both_sides_have_the_tempered_distribution(setup: Setup) -> None:
    """The engine's numbers are the trainer's, other than without; the gradient is that of logits / T."""
    (plain,) = setup.run(setup.grpo())
    (warm,) = setup.run(setup.grpo(), "--rollout-temperature 0.6", by_hand="grpo")
    assert warm["losses"][0]["engine mismatch"] < 1e-4
    assert warm["losses"][0]["entropy estimate"] < plain["losses"][0]["entropy estimate"] - 0.1
    assert warm["rollout"]["sequences"] != plain["rollout"]["sequences"]
    assert_same(grads([warm]), warm["by_hand"])


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 2])
def test_grpo_resumes_bit_equal_at_any_step(updates: int, setup: Setup, tmp_path: Path) -> None:
    line = setup.grpo()
    line[line.index("--train-iters") + 1] = "4"
    line[line.index("--global-batch-size") + 1] = str(8 // updates)
    line += ["--updates-per-rollout", str(updates), "--lr", "1e-3", "--lr-decay-style", "constant"]
    line += [
        "--renew-reference",
        "2",
        "--save-interval",
        "1",
        "--save",
        str(tmp_path),
        "--load",
        str(tmp_path),
    ]
    (straight,) = setup.run(line)
    first = (tmp_path / "posttrain.jsonl").read_text()
    for step in (3, 1):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(step))
        (resumed,) = setup.run(line)
        for name, (_, weight) in straight["weights"].items():
            assert torch.equal(weight, resumed["weights"][name][1]), (step, name)
        assert (tmp_path / "posttrain.jsonl").read_text() == first
