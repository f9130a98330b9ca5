"""Weights that are sparse without a pattern, or in one that no other row serves: a bit for each
weight, and the kept values alone."""

from __future__ import annotations

import torch

from ...compiler.ir import packing
from ...compiler.ir.errors import ModelError
from ..prepack import expect, pad, scale_tiles, wrap
from ..problem import DTYPES, Parts, Problem, Requirement
from ..row import TILE_ROWS, Argument, KernelRow
from .bytes import BESIDE, SHAPE
from .common import CHOICES, SCALE, SIDES, SPLITS, UNROUTED, linear_args
from .sparse_nm import ones


def _tiles(row: KernelRow, value: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [Np/64, Kp/128, 64, 128]."""
    value = pad(value, TILE_ROWS, row.step)
    return value.reshape(len(value) // TILE_ROWS, TILE_ROWS, -1, row.step).permute(0, 2, 1, 3)


def _marks(row: KernelRow, mask: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """bool [N, K] -> the bits of all tiles, where each row begins among the kept values of its tile
    and each tile among all; and the mask in tiles."""
    tiles = _tiles(row, mask.to(torch.int64))
    bits = (tiles.unflatten(-1, (4, 32)) << torch.arange(32, device=mask.device)).sum(-1)
    count = tiles.sum(-1)
    begins = count.cumsum(-1) - count
    starts = torch.nn.functional.pad(count.sum(-1).flatten().cumsum(0), (1, 0))
    return {
        "bitmap": wrap(bits.transpose(-1, -2)).contiguous(),
        "begins": begins.to(torch.int32).contiguous(),
        "starts": starts.to(torch.int32),
    }, tiles


def _mask(problem: Problem, parts: Parts) -> torch.Tensor:
    """Which weights are kept, bool [N, K]."""
    if problem.m:
        kept = parts["meta"].new_ones(problem.N, problem.columns, dtype=torch.bool)
        mask = packing.expand_nm(kept, parts["meta"], problem.n, problem.m, problem.K)
        if int(mask.sum()) != kept.numel():
            raise ModelError(f"expected {problem.n} positions of each {problem.m} columns, found "
                             "one twice")  # fmt: skip
        return mask
    expect("bitmap", parts.get("bitmap"), (problem.N, packing.packed_words(problem.K, 1)))
    return packing.unpack(parts["bitmap"], 1, problem.K).bool()


def _spread(problem: Problem, kept: torch.Tensor, parts: Parts) -> torch.Tensor:
    return packing.expand_nm(kept, parts["meta"], problem.n, problem.m, problem.K)


def _dense(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    mask = _mask(problem, parts)
    values = parts["values"]
    if values.dtype != DTYPES[problem.x_dtype]:
        raise ModelError(f"expected {DTYPES[problem.x_dtype]} values, found {values.dtype}")
    marks, tiles = _marks(row, mask)
    if problem.m:
        expect("values", values, (problem.N, problem.columns))
        dense = _spread(problem, values, parts)
    else:
        expect("values", values, (int(mask.sum()),))
        dense = values.new_zeros(mask.shape).masked_scatter(mask, values)
    kept = _tiles(row, dense)[tiles.bool()]
    return {**marks, "values": kept, "scale": ones(row, problem, values.device)}


def _codes(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """Kept codes as one run of nibbles, low ones first."""
    marks, tiles = _marks(row, _mask(problem, parts))
    q = packing.unpack(parts["codes"], 4, problem.columns).to(torch.int64)
    if problem.m:
        q = _spread(problem, q, parts)
    kept = _tiles(row, q)[tiles.bool()]
    twos = torch.nn.functional.pad(kept, (0, len(kept) % 2)).reshape(-1, 2)
    codes = (twos[:, 0] | (twos[:, 1] << 4)).to(torch.uint8).view(torch.int8)
    return {**marks, "codes": codes, "scale": scale_tiles(row, problem, parts)}


BITMAP = Argument("bitmap", "[Np/64, Kp/128, 4, 64]", ("i32",), dtype="i32")
BEGINS = Argument("begins", "[Np/64, Kp/128, 64]", ("i32",), dtype="i32")
STARTS = Argument("starts", "[Np*Kp/8192 + 1]", ("i32",), dtype="i32")

# A mask of n:m is marked by bits as any other; 2:4 has rows of its own.
MARKED = (
    Requirement("bitmap", "Eq(bitmap, 1) | (m > 0)", "True, or n:m"),
    Requirement(
        "m", "Eq(m, 0) | (Eq(bitmap, 0) & (Ne(n, 2) | Ne(m, 4)))", "0, or n:m other than 2:4"
    ),
)
KEPT = "Max(kept, N*K*n/Max(m, 1))"

W16_BITMAP = KernelRow(
    name="w16_bitmap",
    op="llmc.fused",
    template="bitmap.py.j2",
    summary="fp16 or bf16 weights sparse without a pattern: a bitmap and the kept values",
    args=linear_args(
        Argument("values", "[kept + 8]", ("fp16", "bf16")), BITMAP, BEGINS, STARTS, SCALE
    ),
    step=128,
    choices={
        **CHOICES,
        **UNROUTED,
        "x_dtype": ("fp16", "bf16"),
        "scale_dtype": ("",),
        "asym": (False,),
        "weights": ("dense",),
        "bitmap": (True, False),
    },
    requires=(*MARKED, *SHAPE),
    moves=f"2*{KEPT} + 5*Np*Kp/32 + 4*(Np*Kp/8192 + 1) + {SIDES}",
    tiles=((8, 64), (16, 64), (32, 64)),
    stages=(2, 3, 4),
    splits=SPLITS,
    fits=(BESIDE,),
    pack=_dense,
)

W4_BITMAP = KernelRow(
    name="w4_bitmap",
    op="llmc.fused",
    template="bitmap.py.j2",
    summary="4-bit weights sparse without a pattern, a bitmap and kept codes; for size, not time",
    args=linear_args(
        Argument("codes", "[kept/2]", ("i8",), dtype="i8"), BITMAP, BEGINS, STARTS, SCALE
    ),
    step=128,
    choices={**CHOICES, **UNROUTED, "x_dtype": ("fp16", "bf16"), "bitmap": (True, False)},
    requires=(
        Requirement("bits", "Eq(bits, 4)", "4"),
        *MARKED,
        Requirement(
            "group",
            "Eq(Mod(group, 128), 0) | Eq(group, 32) | Eq(group, 64)",
            "32, 64, a multiple of 128, or one scale per row",
        ),
        *SHAPE,
    ),
    moves=f"ceiling({KEPT}/2) + 5*Np*Kp/32 + 4*(Np*Kp/8192 + 1) + {SIDES}",
    tiles=((8, 64), (16, 64), (32, 64)),
    stages=(2, 3, 4),
    splits=SPLITS,
    fits=(BESIDE,),
    pack=_codes,
)
