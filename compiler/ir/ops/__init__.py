"""All op rows. Importing this package registers every row, once."""

from . import attention, compressed, semantic
from .base import ROWS, OpRow, Tie, cost, infer, row, row_for, row_of

__all__ = [
    "ROWS", "OpRow", "Tie", "attention", "compressed", "cost", "infer", "row", "row_for", "row_of",
    "semantic",
]  # fmt: skip
