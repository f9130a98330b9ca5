"""Symbolic dimensions: an int, or a sympy expression over positive integer symbols (B, S)."""

from __future__ import annotations

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


def parse(text: str) -> Dim:
    """Inverse of :func:`show` for arithmetic of symbols and integers; never evaluates code."""
    import ast

    def walk(node: ast.expr) -> Dim:
        match node:
            case ast.Constant(value=int() as v):
                return v
            case ast.Name(id=name):
                return symbol(name)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return walk(left) + walk(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return walk(left) - walk(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return walk(left) * walk(right)
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return walk(left) ** walk(right)
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return sympy.floor(sympy.sympify(walk(left)) / walk(right))
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return sympy.sympify(walk(left)) / walk(right)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.Call(func=ast.Name(id="floor"), args=[arg]):
                return sympy.floor(walk(arg))
        raise ValueError(f"expected a dimension, found {text!r}")

    return dim(walk(ast.parse(text, mode="eval").body))
