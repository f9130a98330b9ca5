"""int8 weights times int8 inputs: all columns, or all but those that hold outliers."""

from __future__ import annotations

import torch

from ...compiler.ir import packing
from ..grids import Grids
from ..prepack import scale_tiles
from ..problem import Parts, Problem, Requirement
from ..row import KernelRow
from . import rounded
from .rounded import INT8, SIDES, STEP

_REQUIRES = (Requirement("bits", "(bits >= 2) & (bits <= 8)", "2 to 8"), *rounded.REQUIRES)


def pack(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """Codes without their offset, one a byte, the scales, and what rounding x needs."""
    q = packing.unpack(parts["codes"], problem.bits, problem.K).to(torch.int16)
    codes = rounded.byte_tiles((q - (1 << (problem.bits - 1))).to(torch.int8))
    scale = scale_tiles(row, problem, parts)
    return {"codes": codes, "scale": scale, **rounded.grid_tensors(problem, parts)}


W8A8_CODES = KernelRow(
    name="w8a8_codes",
    op="llmc.fused",
    template="products8.py.j2",
    summary="int8 weights times the int8 codes of x that round_int8 made",
    args=rounded.product_args("i8"),
    step=STEP,
    choices=rounded.choices(("",), rounded=Grids(*INT8, limits=True), outliers=rounded.UpTo(4096)),
    requires=_REQUIRES,
    moves=rounded.CODES_MOVE,
    tiles=rounded.TILES,
    stages=(3, 4),
    fits=rounded.FITS,
    pack=pack,
    product="int8",
)


def _row(name: str, summary: str, outliers: tuple[object, ...], limits: bool) -> KernelRow:
    return KernelRow(
        name=name,
        op="llmc.fused",
        template="products8.py.j2",
        summary=summary,
        args=rounded.args("i8"),
        step=STEP,
        choices=rounded.choices(Grids(*INT8, limits=limits), outliers=outliers),
        requires=_REQUIRES,
        moves=f"Np*Kp + {SIDES}",
        tiles=rounded.TILES,
        stages=(3, 4),
        fits=rounded.FITS,
        pack=pack,
        product="int8",
        call=rounded.call(rounded.ROUND_INT8, W8A8_CODES),
        inner=rounded.inner(W8A8_CODES),
    )


W8A8 = _row(
    "w8a8", "int8 weights times x put on int8, per token or with a stored scale", (0,), True
)
INT8_SPLIT = _row(
    "int8_split",
    "int8 products, with columns of outliers beside them as they are and tokens beyond a limit "
    "not rounded",
    rounded.UpTo(4096, least=1),
    True,
)
