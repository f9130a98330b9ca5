"""Symbolic dimensions: an int, or a sympy expression over positive integer symbols (B, S)."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeAlias

import sympy

Dim: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Dim, ...]


def symbol(name: str) -> sympy.Symbol:
    """The positive integer symbol of that name; equal names are equal symbols."""
    return sympy.Symbol(name, integer=True, positive=True)


BATCH, SEQ = symbol("B"), symbol("S")
PAST = symbol("P")
"""Tokens already in a state."""


def dim(value: object) -> Dim:
    """Normalise a number or expression: an int where it is one, else an expanded expression."""
    if isinstance(value, int):
        return int(value)
    expr = sympy.expand(sympy.sympify(value))
    return int(expr) if expr.is_Integer else expr


def same(a: Dim, b: Dim) -> bool:
    """Whether two dims are provably equal for every value of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b) or _proved(sympy.sympify(a), sympy.sympify(b))


@lru_cache(maxsize=1 << 14)
def _proved(a: sympy.Expr, b: sympy.Expr) -> bool:
    rest = sympy.expand(a - b)
    if rest == 0:
        return True
    # An expanded polynomial that is not 0 differs somewhere: no need for the slow simplifier.
    if rest.is_polynomial(*rest.free_symbols):
        return False
    return bool(sympy.simplify(rest) == 0)


def same_shape(a: Shape, b: Shape) -> bool:
    """Whether two shapes have equal rank and provably equal dims."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def numel(shape: Iterable[Dim]) -> Dim:
    """Product of the dims."""
    out: Dim = 1
    for d in shape:
        out = out * d
    return dim(out)


def divide(a: Dim, b: Dim) -> Dim | None:
    """a / b where b provably divides a, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    q = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    return dim(q) if sympy.denom(q) == 1 else None


def show(d: Dim) -> str:
    """Short text of a dim, e.g. ``B*S``."""
    return str(d)


def show_shape(shape: Shape) -> str:
    """Short text of a shape, e.g. ``[B, S, 256]``."""
    return "[" + ", ".join(show(d) for d in shape) + "]"


def evaluate(d: Dim, values: Mapping[str, int]) -> int:
    """The dim's value for given symbol values (by name)."""
    if isinstance(d, int):
        return d
    return int(d.subs({s: values[s.name] for s in d.free_symbols}))


_MAX_TEXT, _MAX_INT, _MAX_POWER, _MAX_TERMS = 4096, 1 << 63, 8, 64
_FUNCTIONS = {"floor": (sympy.floor, 1), "ceiling": (sympy.ceiling, 1), "Mod": (sympy.Mod, 2)}


def parse(text: str) -> Dim:
    """Inverse of :func:`show`: sums, products, quotients and small powers of symbols and integers.

    Never evaluates code, and bounds what it builds.
    Raises:
        ValueError: another text, or one that is too long or holds too large a number.
    """
    if len(text) > _MAX_TEXT:
        raise ValueError(f"expected a dimension of at most {_MAX_TEXT} characters")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"expected a dimension, found {text[:80]!r}") from None
    return dim(_walk(tree))


def _product(a: Dim, b: Dim) -> Dim:
    # Multiplying out sums can explode; what show() writes is multiplied out already.
    terms = [len(sympy.Add.make_args(sympy.sympify(v))) for v in (a, b)]
    if terms[0] * terms[1] > _MAX_TERMS:
        raise ValueError(f"expected a dimension of at most {_MAX_TERMS} terms")
    return dim(a * b)


def _walk(node: ast.expr) -> Dim:
    match node:
        case ast.Constant(value=int() as v) if type(v) is int and v < _MAX_INT:
            return v
        case ast.Name(id=name):
            return symbol(name)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as v)):
            if type(v) is int and 0 <= v <= _MAX_POWER:
                out: Dim = 1
                for _ in range(v):
                    out = _product(out, _walk(left))
                return out
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _walk(left) + _walk(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _walk(left) - _walk(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _product(_walk(left), _walk(right))
        case ast.BinOp(left=left, op=ast.FloorDiv() | ast.Div() as op, right=right):
            divisor = _walk(right)
            if divisor != 0:
                quotient = sympy.sympify(_walk(left)) / divisor
                return sympy.floor(quotient) if isinstance(op, ast.FloorDiv) else quotient
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_walk(operand)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            function, arity = _FUNCTIONS[name]
            if len(args) == arity:
                return function(*map(_walk, args))
    raise ValueError(f"expected a dimension, found {ast.unparse(node)[:80]!r}")
