"""The kernel that makes inputs on a grid, in their own dtype, before a product of many tokens."""

from __future__ import annotations

from ..grids import Made
from ..problem import Requirement
from ..row import Argument, KernelRow
from .common import FLOATS
from .rounded import ROUND_INT8

MADE_INPUT = KernelRow(
    name="made_input",
    op="llmc.round_input",
    template="made_input.py.j2",
    summary="norm, smooth and any grid of a token's own, in the dtype of x",
    args=(
        Argument("x", "[M, K]", FLOATS, strided=True),
        Argument("gain", "[K]", FLOATS, "gained", dtype="fp32"),
        Argument("shift", "[K]", ("fp32",), "centred", dtype="fp32"),
        Argument("in_scale", "[groups]", ("fp32",), "static", dtype="fp32"),
        Argument("limit", "[1]", ("fp32",), "limited", dtype="fp32"),
        Argument("between", "[M, K]", ("fp32",), "mixed_twice", dtype="fp32"),
        Argument("y", "[M, K]", FLOATS),
    ),
    step=128,
    choices={**ROUND_INT8.choices, "rounds": Made(), "mixed": (False, True), "outliers": (0,)},
    requires=(Requirement("made", "Eq(made, 1)", "1 (x is put on a grid)"),),
    moves="2*xb*M*K + 4*K*Max(norm, smooth) + 4*K*centred",
    tiles=ROUND_INT8.tiles,
    stages=(1, 1),
    fits=(),
    pack=ROUND_INT8.pack,
    product="none",
)
