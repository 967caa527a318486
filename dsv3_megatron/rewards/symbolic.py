"""Whether two short mathematical texts say the same: numbers, fractions, expressions, sets, tuples, equations.

Both are parsed by `formula`; what is not of its language is compared as text.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dsv3_megatron.rewards.formula import MAX_CHARACTERS, NotMath, has_operators, parse, plain_text

TIME_S = 3.0


class _TooLong(BaseException):
    """Out of the time limit (BaseException: sympy swallows others)."""


def equal(given: str, expected: str, time_s: float = TIME_S) -> bool:
    """Whether two answers are equal.

    Equal texts are, after spaces, $…$, \\left, units of degree and percent signs and the like are taken away.
    Otherwise both are parsed: numbers are equal exactly (0.5 and 1/2; 0.333 is not 1/3), expressions where their
    difference simplifies to 0, tuples and intervals member by member, sets in any order, equations up to a factor.

    Args:
        time_s: for sympy, on the main thread of a process (elsewhere there is no alarm: the reward's own limit holds);
            what takes longer is not equal.
    """
    if len(given) > MAX_CHARACTERS or len(expected) > MAX_CHARACTERS:
        return given.strip() == expected.strip()
    left, right = plain_text(given), plain_text(expected)
    if left == right:
        return left != ""
    if left.casefold() == right.casefold() and not has_operators(right):
        return True  # words: Yes, yes
    import sympy  # noqa: F401 (before the alarm, which must not cut an import short)

    try:
        with _alarm(time_s):
            return _same(parse(given), parse(expected))
    except (NotMath, _TooLong):
        return False
    except (
        ArithmeticError,
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
        RecursionError,
        MemoryError,
    ):
        return False  # sympy gave up


@contextmanager
def _alarm(time_s: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, time_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _same(left: Any, right: Any) -> bool:
    import sympy

    if isinstance(left, tuple) or isinstance(right, tuple):
        if not (isinstance(left, tuple) and isinstance(right, tuple)):
            return False
        (kind, ours), (other, theirs) = left, right
        if kind != other or len(ours) != len(theirs):
            return False
        if kind == "=":
            return _zero_up_to_factor(ours[0] - ours[1], theirs[0] - theirs[1])
        if kind == "{}":
            rest = list(theirs)
            for member in ours:
                match = next((place for place, one in enumerate(rest) if _same(member, one)), None)
                if match is None:
                    return False
                rest.pop(match)
            return True
        return all(map(_same, ours, theirs))
    if left == right:
        return True
    difference = left - right
    if left.is_number and right.is_number:
        if left.is_Rational and right.is_Rational:
            return False
        # Exactly, but only where the numbers say that it can be.
        if not _near(left, right):
            return False
    elif not _same_at_points(left, right):
        return False
    return bool(sympy.simplify(difference) == 0 or difference.equals(0))


def _same_at_points(left: Any, right: Any) -> bool:
    """Whether two expressions agree where they are tried: cheap, and most wrong answers end here."""
    import sympy

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    for start in (3, 5, 11):
        point = {one: sympy.Rational(start + 2 * place, 7 + place) for place, one in enumerate(symbols)}
        ours, theirs = left.subs(point), right.subs(point)
        if ours.is_finite and theirs.is_finite and not _near(ours, theirs):
            return False
    return True


def _near(left: Any, right: Any) -> bool:
    a, b = complex(left.evalf(30)), complex(right.evalf(30))
    return abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b))


def _zero_up_to_factor(left: Any, right: Any) -> bool:
    import sympy

    if left == right:
        return True
    if left == 0 or right == 0:
        return False
    ratio = sympy.simplify(left / right)
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)
