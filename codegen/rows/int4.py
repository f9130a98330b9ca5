"""4-bit weights: dense, and 2:4 sparse."""

from __future__ import annotations

import torch

from ...compiler.ir import packing
from ...compiler.ir.errors import ModelError
from ..prepack import expect, pad, scale_tiles, words
from ..problem import Parts, Problem, Requirement
from ..row import TILE_ROWS, Argument, KernelRow
from .bytes import MANY, SIXTEEN
from .common import CHOICES, SCALE, SIDES, SPLITS, linear_args


def _codes(shape: str) -> Argument:
    return Argument("codes", shape, ("i32",), dtype="i32")


def _dense(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    q = packing.unpack(parts["codes"], 4, problem.K).to(torch.int64)
    return {"codes": dense_tiles(row, q), "scale": scale_tiles(row, problem, parts)}


def dense_tiles(row: KernelRow, q: torch.Tensor) -> torch.Tensor:
    """q [N, K] -> int32 [Np/64, Kp/128, 64, 16].

    Column 32 j + 2 w + e of a step is nibble j + 4 e of word w.
    """
    q = pad(q, TILE_ROWS, row.step)
    q = q.reshape(q.shape[0] // TILE_ROWS, TILE_ROWS, -1, 4, 16, 2).permute(0, 2, 1, 4, 5, 3)
    return words(q.flatten(-2))


def _sparse(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    q = packing.unpack(parts["codes"], 4, problem.columns).to(torch.int64)
    tiles = _sparse_tiles(row, problem, q, parts["meta"], parts.get("zero"))
    return {"codes": tiles, "scale": scale_tiles(row, problem, parts)}


def _sparse_tiles(
    row: KernelRow,
    problem: Problem,
    q: torch.Tensor,
    meta: torch.Tensor,
    zero: torch.Tensor | None,
) -> torch.Tensor:
    """Kept q [N, K/2] and their positions -> int32 [Np/64, Kp/256, 3, 64, 8].

    The sections are first kept code ^ zero, second kept code ^ zero, and the keep mask (bit i:
    column i of the block is kept); nibble p of word w belongs to block 8 p + w of the step.
    """
    where = packing.unpack(meta, packing.nm_bits(problem.m), problem.columns).to(torch.int64)
    expect("meta", where, (problem.N, problem.columns))
    if zero is None:
        q = q ^ 8
    else:
        columns = torch.arange(problem.columns, device=q.device)
        q = q ^ zero.to(torch.int64)[:, columns // (problem.dense_group // 2 or problem.columns)]
    first, second = q[:, 0::2], q[:, 1::2]
    if bool((where[:, 0::2] >= where[:, 1::2]).any()):
        raise ModelError("expected ascending kept positions in each block of 4, found others")
    keep = (1 << where[:, 0::2]) | (1 << where[:, 1::2])
    sections = []
    for nibbles in (first, second, keep):
        nibbles = pad(nibbles, TILE_ROWS, row.step // 4)
        nibbles = nibbles.reshape(nibbles.shape[0] // TILE_ROWS, TILE_ROWS, -1, 8, 8)
        sections.append(words(nibbles.permute(0, 2, 1, 4, 3)))
    return torch.stack(sections, 2).contiguous()


W4A16 = KernelRow(
    name="w4a16",
    op="llmc.fused",
    template="w4a16.py.j2",
    summary="4-bit weights, symmetric or with zero points, one scale per group or per row",
    args=linear_args(_codes("[Np/64, Kp/128, 64, 16]"), SCALE),
    step=128,
    choices=CHOICES,
    requires=(
        Requirement("bits", "Eq(bits, 4)", "4"),
        Requirement("m", "Eq(m, 0)", "0 (dense)"),
        Requirement(
            "group",
            "Eq(Mod(group, 128), 0) | Eq(group, 16) | Eq(group, 32) | Eq(group, 64)",
            "16, 32, 64, a multiple of 128, or one scale per row",
        ),
        Requirement("N", "N >= 1", "at least 1"),
        Requirement("K", "K >= 16", "at least 16"),
    ),
    moves=f"Np*Kp/2 + {SIDES}",
    tiles=(
        (8, 32),
        (8, 64),
        (8, 128),
        (16, 32),
        (16, 64),
        (16, 128),
        (32, 64),
        (32, 128),
        (64, 64),
    ),
    stages=(3, 4, 6),
    splits=SPLITS,
    fits=(
        "Eq(wide, 0) | (BM <= 16)",
        MANY,
        SIXTEEN,
    ),
    pack=_dense,
)

W4A16_24 = KernelRow(
    name="w4a16_24",
    op="llmc.fused",
    template="w4a16_24.py.j2",
    summary="2:4 sparse 4-bit weights: kept codes and keep masks, spread to dense in registers",
    args=linear_args(_codes("[Np/64, Kp/256, 3, 64, 8]"), SCALE),
    step=256,
    choices=CHOICES,
    requires=(
        Requirement("bits", "Eq(bits, 4)", "4"),
        Requirement("n", "Eq(n, 2)", "2"),
        Requirement("m", "Eq(m, 4)", "4"),
        Requirement(
            "group",
            "Eq(Mod(group, 256), 0) | Eq(group, 32) | Eq(group, 64) | Eq(group, 128)",
            "32, 64, 128, a multiple of 256 dense columns, or one scale per row",
        ),
        Requirement("N", "N >= 1", "at least 1"),
        Requirement("K", "(K >= 16) & Eq(Mod(K, 4), 0)", "at least 16, a multiple of 4"),
    ),
    moves=f"3*Np*Kp/8 + {SIDES}",
    tiles=((8, 32), (16, 32), (16, 64), (16, 128), (32, 64)),
    stages=(2, 3),
    splits=SPLITS,
    fits=("Eq(wide, 0) | (BM * BN <= 1024)", "Eq(norm, 0) | (BN <= 64)"),
    pack=_sparse,
)
