"""The form of a refusal, and questions that several ask."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

from dsv3_megatron.arguments.surroundings import Surroundings


@dataclass(frozen=True)
class Refusal:
    """One unsupported argument or combination.

    Attributes:
        name: short and unique; tests are named after it.
        feature: heading in the support matrix.
        argument: the option the message starts with.
        value: what the user gave, as a format string over Megatron's argument names, e.g. `"{fp8}"`.
        when: whether these arguments are refused; they are parsed, not yet validated by Megatron.
        reason: why, as a format string over Megatron's argument names and the surroundings' fields.
        use: what to use, as a format string.
        example: words that trigger it, added to a valid command line.
        where: surroundings of the example.
        without: words of the valid command line that the example lacks.
        detail: what the message adds about these very arguments, computed from them.
        remedy: what to use for these very arguments, where `use` can only say it in general.
    """

    name: str
    feature: str
    argument: str
    value: str
    when: Callable[[Namespace, Surroundings], bool]
    reason: str
    use: str
    example: str
    where: Surroundings = field(default_factory=lambda: Surroundings(world_size=8))
    without: str = ""
    detail: Callable[[Namespace, Surroundings], str] | None = None
    remedy: Callable[[Namespace, Surroundings], str] | None = None

    def message(self, args: Namespace, around: Surroundings) -> str:
        """The error text: argument, value, reason, what to use."""
        names = {**vars(around), **vars(args)}
        value = self.value.format(**names)
        given = f"{self.argument} {'(not given)' if value == 'None' else value}".strip()
        reason = self.reason.format(**names)
        if self.detail is not None:
            reason += f" ({self.detail(args, around)})"
        use = self.use.format(**names) if self.remedy is None else self.remedy(args, around)
        return f"{given}: {reason}. Use {use}."


def has_cuda_graphs(a: Namespace) -> bool:
    """Whether CUDA graphs of any kind are asked for, in Megatron's words of today or of before."""
    return a.cuda_graph_impl != "none" or a.enable_cuda_graph or a.external_cuda_graph
