"""int8 inputs times int8 weights, all columns or all but those that hold outliers, and times
4-bit weights."""

from __future__ import annotations

import dataclasses

import torch

from ...compiler.ir import packing
from ..grids import Grids
from ..prepack import pad, scale_tiles, words
from ..problem import Parts, Problem, Requirement
from ..row import TILE_ROWS, Argument, KernelRow
from . import rounded
from .common import UpTo
from .rounded import INT8, SIDES, STEP

_REQUIRES = (
    Requirement("bits", "(bits >= 2) & (bits <= 8) & Ne(bits, 4)", "2 to 8, 4 aside"),
    *rounded.REQUIRES,
)


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
    choices=rounded.choices(("",), rounded=Grids(*INT8, limits=True), outliers=UpTo(4096)),
    requires=_REQUIRES,
    moves=rounded.CODES_MOVE,
    tiles=rounded.TILES,
    stages=(2, 3, 4),  # the largest tile has room for three
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
        stages=(2, 3, 4),  # the largest tile has room for three
        fits=rounded.FITS,
        pack=pack,
        product="int8",
        call=rounded.call(rounded.ROUND_INT8, W8A8_CODES),
        inner=rounded.inner(W8A8_CODES),
    )


W8A8 = _row(
    "w8a8", "int8 weights times x put on int8, per token or with a stored scale", (0,), True
)
INT8_SPLIT = dataclasses.replace(
    _row(
        "int8_split",
        "int8 products, with columns of outliers beside them as they are and tokens beyond a limit "
        "not rounded",
        UpTo(4096, least=1),
        True,
    ),
    tiles=rounded.TILES[:-1],  # the largest has no registers left for outliers
)


def _pack_nibbles(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """Signed codes of 4 bits -> int32 [Np/64, Kp/128, 64, 16].

    Column 64 j + 4 w + e of a step is nibble j of byte e of word w.
    """
    q = packing.unpack(parts["codes"], 4, problem.K).to(torch.int64)
    q = pad((q - 8) & 15, TILE_ROWS, STEP)
    q = q.reshape(q.shape[0] // TILE_ROWS, TILE_ROWS, -1, 2, 16, 4).permute(0, 2, 1, 4, 5, 3)
    scale = scale_tiles(row, problem, parts)
    return {"codes": words(q.flatten(-2)), "scale": scale, **rounded.grid_tensors(problem, parts)}


_NIBBLES = Argument("codes", "[Np/64, Kp/128, 64, 16]", ("i32",), dtype="i32")
_FOUR = (Requirement("bits", "Eq(bits, 4)", "4"), *rounded.REQUIRES)


def _nibbles(args: tuple[Argument, ...]) -> tuple[Argument, ...]:
    return tuple(_NIBBLES if a.name == "codes" else a for a in args)


W4A8_CODES = dataclasses.replace(
    W8A8_CODES,
    name="w4a8_codes",
    summary="4-bit weights times the int8 codes of x that round_int8 made",
    args=_nibbles(W8A8_CODES.args),
    requires=_FOUR,
    moves=f"{rounded.CODES_MOVE} - Np*Kp/2",
    tiles=rounded.TILES[:-1],  # nibbles take the registers of the largest
    pack=_pack_nibbles,
)
W4A8 = dataclasses.replace(
    W8A8,
    name="w4a8",
    summary="4-bit weights times x put on int8, with columns of outliers beside them or not",
    args=_nibbles(W8A8.args),
    choices=rounded.choices(Grids(*INT8, limits=True), outliers=UpTo(4096)),
    requires=_FOUR,
    moves=f"Np*Kp/2 + {SIDES}",
    tiles=rounded.TILES[:-1],
    pack=_pack_nibbles,
    call=rounded.call(rounded.ROUND_INT8, W4A8_CODES),
    inner=rounded.inner(W4A8_CODES),
)
