"""All kernel rows in order of preference, and the choice among them."""

from __future__ import annotations

from ..compiler.ir.errors import UsageError, nearest
from .problem import Misfit, Problem
from .row import KernelRow
from .rows.bytes import W8A16
from .rows.int4 import W4A16, W4A16_24
from .rows.int8_products import INT8_SPLIT, W8A8, W8A8_CODES
from .rows.rounded import ROUND_INT8

ROWS: tuple[KernelRow, ...] = (W4A16, W4A16_24, W8A16, W8A8, INT8_SPLIT)
# What calls of other rows launch; never chosen for a linear.
INNER: tuple[KernelRow, ...] = (ROUND_INT8, W8A8_CODES)


def row(name: str) -> KernelRow:
    """The row called `name`; UsageError with the nearest name when there is none."""
    for candidate in (*ROWS, *INNER):
        if candidate.name == name:
            return candidate
    known = [r.name for r in (*ROWS, *INNER)]
    raise UsageError(
        f"no kernel row {name!r}, rows are {', '.join(known)}", hint=nearest(name, known)
    )


def choose(problem: Problem) -> tuple[KernelRow | None, list[Misfit]]:
    """The first row that serves `problem`, or None with every row's refusals."""
    refused: list[Misfit] = []
    for candidate in ROWS:
        why = candidate.misfits(problem)
        if not why:
            return candidate, []
        refused += why
    return None, refused
