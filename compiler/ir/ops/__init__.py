"""All op rows. Importing this package registers every row, once."""

from . import (
    attention,
    bilevel,
    compressed,
    conv,
    create,
    elementwise,
    fused,
    index,
    linalg,
    lookup,
    masks,
    pairs,
    pieces,
    reduce,
    rotation,
    rounding,
    semantic,
    shape,
    sparse,
    train,
)  # fmt: skip
from .base import ROWS, OpRow, Tie, cost, infer, row, row_for, row_of
from .rules import flat

__all__ = [
    "ROWS", "OpRow", "Tie", "attention", "bilevel", "compressed", "conv", "cost", "create",
    "elementwise", "flat", "fused", "index", "infer", "linalg", "lookup", "masks", "pairs",
    "pieces", "reduce", "rotation", "rounding", "row", "row_for", "row_of", "semantic", "shape",
    "sparse", "train",
]  # fmt: skip
