"""The arithmetic of `$((…))` on whole numbers, without `eval`."""

import ast
import operator
import re
from collections.abc import Callable

_TWO = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def evaluate(text: str, value_of: Callable[[str], int | None]) -> int | None:
    """The value of an expression; None where a variable in it is not known, or it is no such expression."""
    text = text.strip()
    ternary = re.fullmatch(r"(.+?)\?(.+):(.+)", text, re.DOTALL)
    if ternary:
        condition = evaluate(ternary[1], value_of)
        return None if condition is None else evaluate(ternary[2] if condition else ternary[3], value_of)
    python = re.sub(r"!(?!=)", " not ", text.replace("&&", " and ").replace("||", " or ")).replace("/", "//")
    try:
        return _value(ast.parse(python.strip(), mode="eval").body, value_of)
    except (SyntaxError, ZeroDivisionError, ValueError, TypeError):
        return None


def _value(node: ast.AST, value_of: Callable[[str], int | None]) -> int | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return int(node.value)
    if isinstance(node, ast.Name):
        return value_of(node.id)
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, value_of)
        if inner is None:
            return None
        return (
            int(not inner)
            if isinstance(node.op, ast.Not)
            else -inner
            if isinstance(node.op, ast.USub)
            else inner
        )
    if isinstance(node, ast.BoolOp):
        values = [_value(part, value_of) for part in node.values]
        if None in values:
            return None
        return int(all(values) if isinstance(node.op, ast.And) else any(values))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        a, b = _value(node.left, value_of), _value(node.comparators[0], value_of)
        return None if a is None or b is None else int(_COMPARE[type(node.ops[0])](a, b))
    if isinstance(node, ast.BinOp):
        a, b = _value(node.left, value_of), _value(node.right, value_of)
        if a is None or b is None:
            return None
        if isinstance(node.op, ast.FloorDiv | ast.Mod):  # bash cuts towards 0
            quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
            return quotient if isinstance(node.op, ast.FloorDiv) else a - quotient * b
        operation = _TWO.get(type(node.op))
        return None if operation is None else operation(a, b)
    raise ValueError(ast.dump(node))
