"""All kernel rows in order of preference, and the choice among them."""

from __future__ import annotations

from ..compiler.ir.errors import UsageError, nearest
from .problem import Misfit, Problem
from .render import add_template, check_template
from .row import KernelRow
from .rows.bitmap import W4_BITMAP, W16_BITMAP
from .rows.bytes import W8A16
from .rows.coded_factors import W2_FACTORS, W3_FACTORS, W4_FACTORS, W8_FACTORS
from .rows.factors import FACTORS
from .rows.float8 import FP8, FP8_CODES
from .rows.floats import W4_FLOAT, W8_FLOAT
from .rows.int4 import W4A16, W4A16_24
from .rows.int8_products import INT8_SPLIT, W4A8, W4A8_CODES, W8A8, W8A8_CODES
from .rows.made import MADE_INPUT
from .rows.pairs import W4_PAIRS
from .rows.planes import W5A16, W6A16
from .rows.rounded import NORM_INPUT, ROUND_E4M3, ROUND_INT8
from .rows.signs import W1_BINARY, W_SIGNS
from .rows.sparse_nm import W8A16_24, W16_24
from .rows.stored import W16
from .rows.tables import W2_LUT, W2A16, W3_LUT, W3A16, W4_LUT

# Products of codes come before those of an input that is on a grid as floats.
ROWS: tuple[KernelRow, ...] = (
    W4_FACTORS, W8_FACTORS, W3_FACTORS, W2_FACTORS,
    W8A8, INT8_SPLIT, W4A8, FP8,
    W4A16, W4A16_24, W8A16, W8A16_24, W16_24, W16_BITMAP, W4_BITMAP, W8_FLOAT, W4_FLOAT,
    W4_PAIRS, W4_LUT, W3_LUT, W2_LUT, W3A16, W2A16, W6A16, W5A16, W1_BINARY, W_SIGNS, FACTORS, W16,
)  # fmt: skip
# What calls of other rows launch; never chosen for a linear.
INNER: tuple[KernelRow, ...] = (
    ROUND_INT8, W8A8_CODES, W4A8_CODES, ROUND_E4M3, FP8_CODES, NORM_INPUT, MADE_INPUT,
)  # fmt: skip


# The user's own, asked first.
_OWN: list[KernelRow] = []


def register(own: KernelRow, template: str) -> None:
    """Add a row of the user's own, with the text of its template, for this process.

    It may extend or include the shipped templates. It is asked before the shipped rows.
    UsageError when its name or the template's is taken.
    """
    known = {r.name for r in (*_OWN, *ROWS, *INNER)}
    if own.name in known:
        raise UsageError(f"expected a new name for a kernel row, found {own.name!r}")
    add_template(own.template, template)
    check_template(own.template)
    _OWN.insert(0, own)


def rows() -> tuple[KernelRow, ...]:
    """Every row that may be chosen for a linear, in order of preference."""
    return (*_OWN, *ROWS)


def row(name: str) -> KernelRow:
    """The row called `name`; UsageError with the nearest name when there is none."""
    for candidate in (*rows(), *INNER):
        if candidate.name == name:
            return candidate
    known = [r.name for r in (*rows(), *INNER)]
    raise UsageError(
        f"no kernel row {name!r}, rows are {', '.join(known)}", hint=nearest(name, known)
    )


def choose(problem: Problem, target: str = "") -> tuple[KernelRow | None, list[Misfit]]:
    """The first row that serves `problem`, or None with every row's refusals.

    ``target`` is the machine, "sm_80" or "sm_90"; "" for any.
    """
    refused: list[Misfit] = []
    for candidate in rows():
        why = candidate.misfits(problem)
        if target and target not in candidate.targets:
            why = [*why, Misfit(candidate.name, "target", target, " or ".join(candidate.targets))]
        if not why:
            return candidate, []
        refused += why
    return None, refused
