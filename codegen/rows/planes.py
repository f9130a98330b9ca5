"""5- and 6-bit weights: four bits of a code in a nibble, what stands above them in a plane."""

from __future__ import annotations

import torch

from ...compiler.ir import packing
from ..prepack import scale_tiles
from ..problem import Parts, Problem, Requirement
from ..row import Argument, KernelRow
from .bytes import DENSE, GROUP, MANY, SHAPE, SIXTEEN, TILES, spread
from .common import CHOICES, SCALE, SIDES, SPLITS, linear_args
from .int4 import dense_tiles

# Where in half e of a byte or a word of 16 bits the bits of column 32 j + 2 w + e stand.
PLACES = {5: (0, 2, 1, 3), 6: (4, 0, 6, 2)}


def _pack(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    bits = problem.bits
    q = packing.unpack(parts["codes"], bits, problem.K).to(torch.int64)
    width = 4 * (bits - 4)  # of the four columns of a half
    places = torch.tensor([p + width * e for p in PLACES[bits] for e in (0, 1)], device=q.device)
    upper = (spread(row, q >> 4) << places).sum(-1)
    upper = torch.where(upper >= 1 << (2 * width - 1), upper - (1 << (2 * width)), upper)
    plane = upper.to(torch.int8 if bits == 5 else torch.int16).contiguous()
    codes = dense_tiles(row, q & 15)
    return {"codes": codes, "plane": plane, "scale": scale_tiles(row, problem, parts)}


def _row(bits: int) -> KernelRow:
    kind = "i8" if bits == 5 else "i16"
    return KernelRow(
        name=f"w{bits}a16",
        op="llmc.fused",
        template="w4a16.py.j2",
        summary=f"{bits}-bit weights, symmetric or with zero points: nibbles, a plane above them",
        args=linear_args(
            Argument("codes", "[Np/64, Kp/128, 64, 16]", ("i32",), dtype="i32"),
            Argument("plane", "[Np/64, Kp/128, 64, 16]", (kind,), dtype=kind),
            SCALE,
        ),
        step=128,
        choices=CHOICES,
        requires=(Requirement("bits", f"Eq(bits, {bits})", str(bits)), DENSE, GROUP, *SHAPE),
        moves=f"{bits}*Np*Kp/8 + {SIDES}",
        tiles=TILES,
        stages=(3, 4, 6),
        splits=SPLITS,
        # Two words of codes and x behind a norm fill the registers of the largest tiles.
        fits=("Eq(wide, 0) | (BM <= 16)", "(BM * BN <= 2048) | Eq(norm, 0)", MANY, SIXTEEN),
        pack=_pack,
    )


W5A16 = _row(5)
W6A16 = _row(6)
