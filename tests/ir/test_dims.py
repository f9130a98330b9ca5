"""Symbolic dims: text and back, division, equality."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.dims import (
    BATCH,
    SEQ,
    dim,
    divide,
    evaluate,
    numel,
    parse,
    same,
    show,
    symbol,
)
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.literals import parse_type, show_value_type
from llmc.compiler.ir.types import DTYPES, SymType, TensorType

LEAVES = st.one_of(st.integers(0, 99), st.sampled_from([BATCH, SEQ, symbol("P")]))


def grown(inner: st.SearchStrategy) -> st.SearchStrategy:  # type: ignore[type-arg]
    pairs = st.tuples(inner, inner)
    return st.one_of(
        pairs.map(lambda p: p[0] + p[1]),
        pairs.map(lambda p: p[0] * p[1]),
        pairs.map(lambda p: p[0] - p[1]),
        inner.map(lambda d: sympy.floor(sympy.sympify(d) / 4)),
        inner.map(lambda d: sympy.Mod(sympy.sympify(d), 4)),
        inner.map(lambda d: d**2),
    )


DIMS = st.recursive(LEAVES, grown, max_leaves=6).map(dim)


@settings(max_examples=80, deadline=None)
@given(DIMS)
def test_text_and_back(d: object) -> None:
    again = parse(show(d))  # type: ignore[arg-type]
    assert same(again, d)  # type: ignore[arg-type]
    assert show(again) == show(d)  # type: ignore[arg-type]


@settings(max_examples=80, deadline=None)
@given(DIMS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_value_of_the_text(d: object, b: int, s: int, p: int) -> None:
    values = {"B": b, "S": s, "P": p}
    assert evaluate(parse(show(d)), values) == evaluate(d, values)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.lists(LEAVES, max_size=4), st.sampled_from(sorted(DTYPES)))
def test_type_text_and_back(shape: list[object], dtype: str) -> None:
    t = TensorType(tuple(map(dim, shape)), DTYPES[dtype])
    for value in (t, SymType(SEQ * 4), (t, None, (t,))):
        assert parse_type(show_value_type(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "B +", "B.real", "f(B)", "__import__('os')", "[B]", "'B'", "1.5", "True", "*B",
        "B if S else 2", "9**9**9", "B**99", "1/0", "B//0", "floor(B, S)", "9" * 40, "lambda: B",
        "B := 3", "(" * 300 + "B" + ")" * 300, "B+" * 3000 + "B", "((B+S)**8)**8",
        "*".join(f"(a{i}+b{i})" for i in range(40)),
    ],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="dimension"):
        parse(text)
    with pytest.raises(ModelError, match="expected"):
        parse_type(f"f32[{text}]")


def test_bounds_of_type_texts() -> None:
    for text in ("f33[B]", "f32[B](S)", "int(S, B)", "f32[-4]", "f32[" + "2," * 40 + "2]"):
        with pytest.raises(ModelError, match="expected"):
            parse_type(text)


def test_division_is_exact_or_none() -> None:
    assert divide(BATCH * SEQ * 8, SEQ * 4) == 2 * BATCH
    assert divide(SEQ, 4) is None
    assert divide(SEQ + 1, SEQ) is None
    assert divide(12, 5) is None
    assert divide(4, 0) is None


def test_equality_is_proved() -> None:
    assert same(SEQ * (BATCH + 1), SEQ * BATCH + SEQ)
    assert not same(SEQ, BATCH)
    assert not same(SEQ, 4)
    assert not same(sympy.floor(SEQ / 2), sympy.floor(SEQ / 3))
    assert same(numel((BATCH, SEQ, 2)), 2 * SEQ * BATCH)
