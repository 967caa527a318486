"""A row of the table of settings: which Megatron option, which value, how firm."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["size", "fixed", "recipe", "run"]


class NotSet:
    """Value of a setting that does not apply to this command line."""


NOT_SET = NotSet()


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        dest: Megatron's name of the argument in its namespace.
        value: DeepSeek-V3's value, or a function from the arguments known so far to it (`NOT_SET`: leave
            it alone).
        flag: option that sets the value; "" where Megatron's own default is that value already.
        kind: see `settings`.
        source: where the value is from.
        also: other accepted values (later phases of the same training, an equivalent implementation).
    """

    dest: str
    value: Any
    flag: str
    kind: Kind
    source: str
    also: tuple[Any, ...] = ()

    def value_for(self, args: Namespace) -> Any:
        """The value for these arguments; `args` may lack what was not given."""
        return self.value(args) if callable(self.value) else self.value

    def accepts(self, value: Any, args: Namespace) -> bool:
        """Whether a given value agrees with DeepSeek-V3 (sizes always do)."""
        if self.kind in ("size", "run"):  # their values may follow from what was not given
            return True
        wanted = self.value_for(args)
        return wanted is NOT_SET or any(same(value, candidate) for candidate in (wanted, *self.also))

    def words(self, args: Namespace) -> list[str]:
        """The command-line words that set the value, `[]` when there is nothing to set."""
        value = self.value_for(args)
        if value is NOT_SET or not self.flag:
            return []
        return [self.flag] if isinstance(value, bool) else [self.flag, str(value)]


def same(a: Any, b: Any) -> bool:
    """Equality that takes Megatron's one-element lists for their element."""
    a, b = (x[0] if isinstance(x, list) and len(x) == 1 else x for x in (a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)
