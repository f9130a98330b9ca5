"""Expressions over numeric fields that rows write as text: their values, and whether they hold."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping

import sympy


@functools.cache
def expression(text: str) -> sympy.Basic:
    """The expression, whose names are all symbols of ours: N means something else inside sympy."""
    tree = list(ast.walk(ast.parse(text, mode="eval")))
    called = {n.func.id for n in tree if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    names = {n.id for n in tree if isinstance(n, ast.Name)} - called
    own = {n: sympy.Symbol(n, integer=True, nonnegative=True) for n in names}
    return sympy.sympify(text, locals=own)


@functools.cache
def names(text: str) -> tuple[str, ...]:
    """The fields that the value depends on, in the order of the alphabet."""
    return tuple(sorted(str(s) for s in expression(text).free_symbols))


def value(text: str, given: Mapping[str, int]) -> int:
    """The value rounded down, exact however large it is."""
    return int(expression(text).subs({s: given[str(s)] for s in expression(text).free_symbols}))


def holds(text: str, given: Mapping[str, int]) -> bool:
    """Whether a predicate over whole numbers is true; nothing is a multiple of 0."""
    try:
        return bool(_compiled(text)(*(given[n] for n in names(text))))
    except ZeroDivisionError:
        return False


@functools.cache
def _compiled(text: str) -> Callable[..., object]:
    # Tuning grids and plans ask thousands of times; sympy takes a millisecond for each answer.
    function: Callable[..., object] = sympy.lambdify(names(text), expression(text), "math")
    return function
