"""Rows' expressions: a compiled predicate says what sympy says, and bytes are exact."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.codegen import formula
from llmc.codegen.attention.rows import ROWS as ATTENTION
from llmc.codegen.kernels import INNER, ROWS

TEXTS = sorted({
    text
    for row in (*ROWS, *INNER, *ATTENTION)
    for text in (*(need.test for need in row.requires), *row.fits)
})  # fmt: skip
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, 31, 32, 64, 100, 128, 256, 1000, 4096])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("text", TEXTS)
def test_a_predicate_holds_where_sympy_says_so(text: str, data: st.DataObject) -> None:
    sizes = {name: data.draw(SIZES, name) for name in formula.names(text)}
    symbols = formula.expression(text).free_symbols
    found = formula.holds(text, sizes | {"beside": 1})
    try:
        told = formula.expression(text).subs({s: sizes[str(s)] for s in symbols})
    except ZeroDivisionError:  # sympy looks at parts that cannot matter
        assert 0 in sizes.values()
    else:  # 0 is a multiple of 0 to sympy, and a refusal here
        assert found == bool(told) or (not found and 0 in sizes.values())


def test_nothing_is_a_multiple_of_zero() -> None:
    """A group of 0 is refused, and is no error of ours."""
    assert not formula.holds("Eq(Mod(E, group), 0)", {"E": 64, "group": 0})


def test_names_of_functions_are_no_fields() -> None:
    """And N is the field, not what sympy calls so."""
    assert formula.names("Eq(Mod(N, 8), 0) | (Max(group, E) < 3)") == ("E", "N", "group")
    assert formula.holds("N < 3", {"N": 2})
    assert not formula.holds("N < 3", {"N": 3})


def test_bytes_are_exact_beyond_doubles() -> None:
    large = 2**60 + 1
    assert formula.value("3*N*K/8 + ceiling(K/2)", {"N": 8, "K": large}) == 3 * large + 2**59 + 1
    assert formula.value("N/3", {"N": large}) == large // 3
