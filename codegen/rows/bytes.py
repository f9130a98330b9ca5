"""8-bit weights: integers on a uniform grid, and 8-bit floats."""

from __future__ import annotations

import torch

from ...compiler.ir import packing
from ..prepack import pad, scale_tiles, wrap
from ..problem import Parts, Problem, Requirement
from ..row import TILE_ROWS, Argument, KernelRow
from .common import CHOICES, SCALE, SIDES, SPLITS, linear_args


def spread(row: KernelRow, q: torch.Tensor) -> torch.Tensor:
    """q [N, K] -> int64 [Np/64, Kp/step, 64, 16, step/16]: codes c = 2 j + e of word w, for
    column 32 j + 2 w + e of a step."""
    q = pad(q, TILE_ROWS, row.step)
    q = q.reshape(q.shape[0] // TILE_ROWS, TILE_ROWS, -1, row.step // 32, 16, 2)
    return q.permute(0, 2, 1, 4, 3, 5).flatten(-2)


def byte_tiles(row: KernelRow, q: torch.Tensor) -> torch.Tensor:
    """q [N, K] of 8 bits -> int32 [Np/64, Kp/128, 2, 64, 16].

    Column 64 s + 32 j + 2 w + e of a step is byte j + 2 e of word w in section s.
    """
    q = pad(q, TILE_ROWS, row.step)
    q = q.reshape(q.shape[0] // TILE_ROWS, TILE_ROWS, -1, 2, 2, 16, 2)
    q = q.permute(0, 2, 3, 1, 5, 6, 4).flatten(-2)
    return wrap((q << torch.arange(0, 32, 8, device=q.device)).sum(-1)).contiguous()


def _integers(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    q = packing.unpack(parts["codes"], 8, problem.K).to(torch.int64)
    return {"codes": byte_tiles(row, q ^ 128), "scale": scale_tiles(row, problem, parts)}


CODES = Argument("codes", "[Np/64, Kp/128, 2, 64, 16]", ("i32",), dtype="i32")
GROUP = Requirement(
    "group",
    "Eq(Mod(group, 128), 0) | Eq(group, 16) | Eq(group, 32) | Eq(group, 64)",
    "16, 32, 64, a multiple of 128, or one scale per row",
)
SHAPE = (
    Requirement("N", "N >= 1", "at least 1"),
    Requirement("K", "K >= 16", "at least 16"),
)
TILES = ((8, 32), (8, 64), (8, 128), (16, 32), (16, 64), (16, 128), (32, 64), (32, 128), (64, 64))
# Wide tiles beside a product of low rank or sparse entries would spill.
BESIDE = "(BM * BN <= 1024) | (Eq(rank, 0) & Eq(sparse, 0))"
# So would many tokens behind a norm, with small groups.
MANY = "(BM < 64) | (group >= 64) | Eq(group, 0) | Eq(norm, 0)"
# So would products of 16 columns each in wide tiles, behind a norm.
SIXTEEN = "(BM * BN <= 1024) | Eq(norm, 0) | (group >= 32) | Eq(group, 0)"
DENSE = Requirement("m", "Eq(m, 0)", "0 (dense)")

W8A16 = KernelRow(
    name="w8a16",
    op="llmc.fused",
    template="w8a16.py.j2",
    summary="8-bit weights, symmetric or with zero points, one scale per group or per row",
    args=linear_args(CODES, SCALE),
    step=128,
    choices=CHOICES,
    requires=(Requirement("bits", "Eq(bits, 8)", "8"), DENSE, GROUP, *SHAPE),
    moves=f"Np*Kp + {SIDES}",
    tiles=TILES,
    stages=(3, 4, 6),
    splits=SPLITS,
    fits=(
        "Eq(wide, 0) | (BM <= 16)",
        MANY,
        BESIDE,
        SIXTEEN,
    ),
    pack=_integers,
)
