"""From a script's options in Megatron's words to the line of `--spec dsv3`: the same model, checked as a run is."""

import itertools
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsv3_megatron.adopt.translate import Launch, Step, translate
from dsv3_megatron.arguments.command_line import parse, parse_given, words_for
from dsv3_megatron.arguments.complete import complete, missing_words
from dsv3_megatron.arguments.errors import RefusedArgument
from dsv3_megatron.arguments.options import OPTIONS, without_meaning, wrong_numbers
from dsv3_megatron.arguments.refusals import REFUSALS
from dsv3_megatron.arguments.refusals.machine import wants_one_connection
from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.setting import NOT_SET, same
from dsv3_megatron.arguments.settings import BY_DEST, SETTINGS
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.checkpoint.model import BY_DEST as MODEL
from dsv3_megatron.checkpoint.model import differences
from dsv3_megatron.pipeline.placement import layer_layout, layers_per_stage

__all__ = ["Adopted", "adopt"]

# Arguments that a run cannot do without as they are: a refusal of one of them is the user's to solve.
ESSENTIAL = frozenset(
    [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "train_iters",
        "train_samples",
        "data_path",
        "train_data_path",
        "split",
        "tokenizer_type",
        "tokenizer_model",
        "load",
        "save",
        "pretrained_checkpoint",
        "lr",
        "lr_decay_style",
        "bf16",
        "pipeline_schedule",
        "fp8_recipe",
        "transformer_impl",
    ]
)


def _even_layout(args: Namespace) -> list[str]:
    counts = layers_per_stage(args.num_layers, args.pipeline_model_parallel_size, 0)
    return ["--pipeline-model-parallel-layout", layer_layout(counts, args.mtp_num_layers or 0)]


# What a refused combination lacks: name of the row to the words that it needs.
MISSING: dict[str, Callable[[Namespace], list[str]]] = {
    "tp_without_sequence_parallel": lambda args: ["--sequence-parallel"],
    "layers_over_stages": _even_layout,
    "mirrors_without_zero": lambda args: ["--use-distributed-optimizer"],
}
# What says the same twice: name of the row to arguments of which the last that the script gives stays.
TWICE = {
    "two_chunkings": (
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
    ),
    "two_lengths": ("train_samples", "train_iters"),
    "data_twice": ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path", "mock_data"),
}
# What counts in samples and in iterations.
COUNTED = ("lr_decay_{}", "lr_warmup_{}", "lr_wsd_decay_{}")
ROUNDS = 20  # of repairs: each takes away or adds an option


@dataclass(frozen=True)
class Adopted:
    """What a launch script becomes.

    Attributes:
        steps: what became of each of its options, in its order.
        words: of `dsv3_megatron.train`, without what `--spec dsv3` fills in.
        filled: (option and value, Megatron's default, source) of what `--spec dsv3` changes without being asked.
        problems: what stands in the way, a line each; () when the line is the script's model and passes every check.
        around: the job that it was checked for.
        assumed: the number of ranks is not known from the script.
    """

    steps: tuple[Step, ...]
    words: tuple[str, ...]
    filled: tuple[tuple[str, str, str], ...] = ()
    problems: tuple[str, ...] = ()
    around: Surroundings = field(default_factory=Surroundings)
    assumed: bool = False


def adopt(launch: Launch, parser: ArgumentParser) -> Adopted:
    """The line for a trainer's launch.

    Args:
        parser: Megatron's with our options.
    """
    line = _Line(translate(launch, parser), parser)
    line.leave_out_what_has_no_place()
    around, assumed = _around(launch, line.args())
    line.keep_the_model()
    line.repair(_with_queues(around, line.args()))
    line.leave_out_what_is_filled_in()
    around = _with_queues(around, line.args())
    return Adopted(
        tuple(line.finished_steps()),
        tuple(line.words()),
        tuple(line.filled_in()),
        tuple(line.problems + _checked(line.words(), parser, around)),
        around,
        assumed,
    )


def _around(launch: Launch, args: Namespace) -> tuple[Surroundings, bool]:
    """The script's job; the smallest that fits where it does not say how large it is."""
    per_node = launch.ranks_per_node or 8
    if launch.nodes is not None and launch.ranks_per_node is not None:
        world, assumed = launch.nodes * per_node, False
    else:
        tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        expert = (args.expert_tensor_parallel_size or tp) * args.expert_model_parallel_size
        world, assumed = math.lcm(tp * args.context_parallel_size, expert) * pp, True
    return Surroundings(world_size=world, ranks_per_node=min(per_node, world), files_here=False), assumed


def _with_queues(around: Surroundings, args: Namespace) -> Surroundings:
    """With the hardware queues that the run needs, which the line sets."""
    return replace(around, max_connections=1 if wants_one_connection(args, around) else 32)


def _checked(words: list[str], parser: ArgumentParser, around: Surroundings) -> list[str]:
    """The errors that a run would end with, none for a good line."""
    try:
        complete(words, parser, around=around)
    except RefusedArgument as error:
        return str(error).splitlines()
    return []


class _Line:
    """The words on their way: each step's, which can be taken away with a reason, and what is added.

    Attributes:
        of_step: the words of each step, by the arguments that they set.
        added: steps that the script has no option for.
        deviations: names for `--allow-deviation`.
        told: arguments that the script speaks of.
        problems: what cannot be had.
    """

    def __init__(self, steps: list[Step], parser: ArgumentParser) -> None:
        self.parser, self.steps, self.added = parser, steps, list[Step]()
        self.deviations: list[str] = []
        self.problems = [f"{s.option}: {s.why}" for s in steps if s.kind in ("impossible", "unknown value")]
        self._leave_out_unreadable()
        self.told = {self._dest(option) for step in steps for option, _ in _by_option(step.words)}
        # As the script means it, before anything is changed: with Megatron's defaults.
        self.original = _megatrons_meaning(parse(parser, self.words()))

    # Words.

    def words(self, without: str = "") -> list[str]:
        """All words, of the last of each option; `without` the argument of this name."""
        last: dict[str, list[str]] = {}
        for step in [*self.steps, *self.added]:
            for option, words in _by_option(step.words):
                dest = self._dest(option)
                if dest not in (without, "spec") and not (dest in last and step.kind == "becomes"):
                    last[dest] = words
        deviations = ["--allow-deviation", *self.deviations] if self.deviations else []
        return ["--spec", "dsv3", *itertools.chain(*last.values()), *deviations]

    def args(self) -> Namespace:
        """Every argument, with what `--spec dsv3` fills in."""
        return self._args(self.words())

    def _args(self, words: list[str]) -> Namespace:
        given = parse_given(self.parser, words)
        return parse(self.parser, [*words, *missing_words(given)])

    def given(self) -> Namespace:
        """What the words give."""
        return parse_given(self.parser, self.words())

    def _dest(self, option: str) -> str:
        return next(a.dest for a in self.parser._actions if option.split("=")[0] in a.option_strings)

    def _leave_out(self, dest: str, why: str) -> None:
        """Take the words of an argument away from every step, which then says why."""
        for at, step in enumerate(self.steps):
            kept = [words for option, words in _by_option(step.words) if self._dest(option) != dest]
            if len(kept) < len(_by_option(step.words)):
                kind = "becomes" if kept else "left out"
                why = f"{step.why}; {why}" if step.why else why
                self.steps[at] = replace(step, kind=kind, words=tuple(itertools.chain(*kept)), why=why)
        self.added = [step for step in self.added if self._dest(step.words[0]) != dest]

    def _add(self, words: Sequence[str], why: str) -> None:
        self.added.append(Step("", "added", tuple(words), why))

    # Steps of the work.

    def _leave_out_unreadable(self) -> None:
        """What the parser cannot read, e.g. a choice that only a fork has."""
        for at, step in enumerate(self.steps):
            try:
                given = parse_given(self.parser, [*step.words])
            except RefusedArgument as error:
                self.steps[at] = replace(step, kind="impossible", words=(), why=_short(error))
                self.problems.append(f"{step.option}: {_short(error)}")
                continue
            for message in wrong_numbers(given, self.parser):
                self.steps[at] = replace(step, kind="left out", words=(), why=message)

    def leave_out_what_has_no_place(self) -> None:
        """Options that are idle, refused, or a setting with another value than the only one."""
        defaults = vars(parse(self.parser, []))
        for dest, value in vars(self.given()).items():
            group, setting = OPTIONS.by_name.get(dest), BY_DEST.get(dest)
            if group is not None and group.fate == "refused" and group.why:
                if group.about == "model" and value != defaults[dest]:
                    self.problems.append(f"{self._shown(dest)}: {group.why}: not the same model")
                self._leave_out(dest, f"{group.why}; {group.use}")
            elif setting is not None and not setting.accepts(value, self.given()):
                self._settle(dest, value)

    def _settle(self, dest: str, value: Any) -> None:
        """A setting that the script has otherwise than DeepSeek-V3."""
        setting = BY_DEST[dest]
        if setting.kind == "recipe":
            self._deviate(dest, "kept, and allowed to differ")
            return
        if dest == "moe_router_load_balancing_type" and "none" in _listed(value):
            # Without a loss: the loss that is there, times nothing.
            self._leave_out(dest, "the sequence's loss with coefficient 0 is none")
            self._leave_out("moe_aux_loss_coeff", "the script has no such loss")
            self._add(["--moe-aux-loss-coeff", "0"], "no balancing loss, as in the script")
            self.deviations.append("moe_aux_loss_coeff")
            return
        wanted = setting.value_for(self.given())
        self._leave_out(dest, f"{dest} is {_plainly(wanted)} in DeepSeek-V3 [{setting.source}]")

    def _deviate(self, dest: str, why: str) -> None:
        wanted = f"{why}: DeepSeek-V3 has {_plainly(BY_DEST[dest].value_for(self.given()))} [{BY_DEST[dest].source}]"
        for at, step in enumerate(self.steps):
            if any(self._dest(option) == dest for option, _ in _by_option(step.words)):
                self.steps[at] = replace(step, why=f"{step.why}; {wanted}" if step.why else wanted)
        self.deviations.append(dest)

    def keep_the_model(self) -> None:
        """Say what the script leaves to Megatron's defaults, where `--spec dsv3` would fill in another model."""
        for _ in range(2):  # the rope type decides whether YaRN's constants count
            for found in differences(self.original, self.args()):
                setting, value = BY_DEST.get(found.dest), MODEL[found.dest].value(self.original)
                if (
                    setting is not None
                    and found.dest not in self.given()
                    and setting.accepts(value, self.given())
                ):
                    words = words_for(self.parser, found.dest, value)
                    if words:
                        self._add(words, f"the script leaves Megatron's default; DeepSeek-V3 has {found.now}")
        for found in differences(self.original, self.args()):
            text = f"{found.option} is {found.recorded} in the script, {found.now} in DeepSeek-V3: not the same model"
            self.problems.append(text)

    def repair(self, around: Surroundings) -> None:
        """Take away, or add, what makes a combination one that is refused or an option one without meaning."""
        for _ in range(ROUNDS):
            args = self.args()
            for dest, why in without_meaning(self.given(), args, self.parser, around).items():
                self._leave_out(dest, why)
            args = self.args()
            if not any(row.when(args, around) and self._repaired(row, args, around) for row in REFUSALS):
                return

    def _repaired(self, row: Refusal, args: Namespace, around: Surroundings) -> bool:
        if row.name in TWICE:
            dests = [dest for dest in vars(self.given()) if dest in TWICE[row.name]]
            if len(dests) > 1:
                self._leave_out(dests[0], _reason(row, args, around))
            return len(dests) > 1
        if row.name == "other_unit" and args.global_batch_size:
            return self._count_alike(args)
        if row.name in MISSING:
            words = MISSING[row.name](args)
            if self._dest(words[0]) in self.given():
                return False
            self._add(words, _reason(row, args, around).partition("; use ")[0])
            return True
        given = vars(self.given())
        names = [word for word in row.argument.replace("/", " ").split() if word.startswith("--")]
        dests = [self._dest(name) for name in names]
        dests = [d for d in dests if d in given and d not in ESSENTIAL and d not in MODEL]
        if dests:
            self._leave_out(dests[0], _reason(row, args, around))
        return bool(dests)

    def _count_alike(self, args: Namespace) -> bool:
        """Give the length's unit, iterations or samples, to what is counted in the other one."""
        unit, other = ("iters", "samples") if args.train_iters else ("samples", "iters")
        for name in COUNTED:
            dest, count = name.format(other), getattr(args, name.format(other))
            if count:
                count = count // args.global_batch_size if unit == "iters" else count * args.global_batch_size
                self._leave_out(dest, f"counted in {unit}, as the length is")
                self._add(
                    words_for(self.parser, name.format(unit), max(1, count)), f"{dest} by --global-batch-size"
                )
        return True

    def leave_out_what_is_filled_in(self) -> None:
        """Take away what is so anyway."""
        for setting in SETTINGS:
            given = self.given()
            if setting.dest not in given or setting.dest in ESSENTIAL:
                continue
            less = Namespace(**{name: value for name, value in vars(given).items() if name != setting.dest})
            filled, before = _filled(less), _filled(given)
            anyway, value = filled.get(setting.dest), getattr(given, setting.dest)
            if isinstance(anyway, str) and not isinstance(value, str):  # as it would be typed
                anyway = getattr(parse_given(self.parser, [setting.flag, anyway]), setting.dest)
            others = all(filled.get(name) == value for name, value in before.items() if name != setting.dest)
            if others and same(anyway, value):
                self._leave_out(setting.dest, f"--spec dsv3 fills it in [{setting.source}]")
                self.deviations = [name for name in self.deviations if name != setting.dest]

    def filled_in(self) -> list[tuple[str, str, str]]:
        """What `--spec dsv3` sets, the script does not give, and Megatron would have had otherwise."""
        defaults = parse(self.parser, [])
        filled = parse_given(self.parser, missing_words(self.given()))
        return [
            (
                " ".join(words_for(self.parser, dest, value)),
                _plainly(getattr(defaults, dest)),
                BY_DEST[dest].source,
            )
            for dest, value in vars(filled).items()
            # The model is compared by itself.
            if dest not in self.told and dest not in MODEL and not same(value, getattr(defaults, dest))
        ]

    def finished_steps(self) -> list[Step]:
        """All steps; `kept` ones have what the line has."""
        return [*self.steps, *self.added]

    def _shown(self, dest: str) -> str:
        return " ".join(words_for(self.parser, dest, getattr(self.given(), dest)))


def _filled(given: Namespace) -> dict[str, Any]:
    """What is given and what is filled in beside it."""
    known = Namespace(**vars(given))
    for setting in SETTINGS:
        if not hasattr(known, setting.dest):
            value = setting.value_for(known)
            if value is not NOT_SET:
                setattr(known, setting.dest, value)
    return vars(known)


def _megatrons_meaning(args: Namespace) -> Namespace:
    """The model that Megatron makes of these arguments, without what has no effect on it."""
    if args.rope_type is None:
        args.rope_type = "yarn"  # MLATransformerConfig's own
    if args.rotary_scaling_factor == 1.0:
        args.rope_type = "rope"  # YaRN by the factor 1 is none
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    if args.multi_latent_attention:
        args.use_rope_scaling = args.rotary_interleaved = False  # not read by MLA
    if args.moe_router_score_function == "sigmoid":
        args.moe_router_pre_softmax = False  # of softmax scores
    return args


def _by_option(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Words by the option that they belong to."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            found.append((word, [word]))
        else:
            found[-1][1].append(word)
    return found


def _reason(row: Refusal, args: Namespace, around: Surroundings) -> str:
    """Why a row refuses and what to use, without the option that it begins with."""
    return row.message(args, around).partition(": ")[2].removesuffix(".").replace(". Use ", "; use ")


def _short(error: RefusedArgument) -> str:
    text = str(error).splitlines()[0].removesuffix(" (all options: --help)")
    return "its value is empty in the script" if text.endswith("expected one argument") else text


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plainly(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
