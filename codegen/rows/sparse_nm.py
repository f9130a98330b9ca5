"""2:4 sparse weights of 16 and of 8 bits; those of 4 bits are in int4."""

from __future__ import annotations

import torch

from ...compiler.ir import packing
from ...compiler.ir.errors import ModelError
from ..prepack import expect, pad, scale_tiles, wrap
from ..problem import DTYPES, Parts, Problem, Requirement
from ..row import TILE_ROWS, Argument, KernelRow
from .bytes import BESIDE
from .common import CHOICES, SCALE, SIDES, SPLITS, linear_args


def kept(problem: Problem, parts: Parts) -> torch.Tensor:
    """Of every block of four columns its mask, bit i for column i, int64 [N, K/4].

    ModelError unless two ascending positions of each block are stored.
    """
    where = packing.unpack(parts["meta"], packing.nm_bits(problem.m), problem.columns)
    where = where.to(torch.int64)
    expect("meta", where, (problem.N, problem.columns))
    first, second = where[:, 0::2], where[:, 1::2]
    if bool((first >= second).any()):
        raise ModelError("expected ascending kept positions in each block of 4, found others")
    return (1 << first) | (1 << second)


def ones(row: KernelRow, problem: Problem, device: torch.device) -> torch.Tensor:
    """Scale words of a weight that stores no scales."""
    one = torch.ones(problem.N, 1, dtype=torch.float16, device=device)
    return scale_tiles(row, problem, {"scale": one})


def blocks(row: KernelRow, value: torch.Tensor, parts: int) -> torch.Tensor:
    """[N, K/4] -> [Np/64, Kp/step, parts, 64, 16]: block 16 p + w of a step."""
    value = pad(value, TILE_ROWS, row.step // 4)
    return value.reshape(len(value) // TILE_ROWS, TILE_ROWS, -1, parts, 16).permute(0, 2, 3, 1, 4)


def masks(keep: torch.Tensor) -> torch.Tensor:
    """[..., 2, 64, 16] masks of two blocks -> [..., 64, 16] bytes: of block s bits 2 s and 2 s + 1
    are those of its first two columns, and bits 2 s + 4 and 2 s + 5 those of the others."""
    spread = (keep & 3) | ((keep >> 2) << 4)
    return spread[..., 0, :, :] | (spread[..., 1, :, :] << 2)


def _signed(value: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.where(value >= 1 << (bits - 1), value - (1 << bits), value)


def _dense(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    values = parts["values"]
    expect("values", values, (problem.N, problem.columns))
    if values.dtype != DTYPES[problem.x_dtype]:
        raise ModelError(f"expected {DTYPES[problem.x_dtype]} values, found {values.dtype}")
    bits = values.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    pairs = blocks(row, bits[:, 0::2] | (bits[:, 1::2] << 16), 2)
    keep = masks(blocks(row, kept(problem, parts), 2))
    return {
        "values": wrap(pairs).contiguous(),
        "keep": _signed(keep, 8).to(torch.int8).contiguous(),
        "scale": ones(row, problem, values.device),
    }


def _bytes(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    q = packing.unpack(parts["codes"], 8, problem.columns).to(torch.int64)
    pairs = blocks(row, q[:, 0::2] | (q[:, 1::2] << 8), 4)
    keep = blocks(row, kept(problem, parts), 4)
    near, far = masks(keep[:, :, 0::2]), masks(keep[:, :, 1::2])
    return {
        "codes": wrap(pairs[:, :, 0::2] | (pairs[:, :, 1::2] << 16)).contiguous(),
        "keep": _signed(near | (far << 8), 16).to(torch.int16).contiguous(),
        "scale": scale_tiles(row, problem, parts),
    }


NM = (Requirement("n", "Eq(n, 2)", "2"), Requirement("m", "Eq(m, 4)", "4"))
SHAPE = (
    Requirement("N", "N >= 1", "at least 1"),
    Requirement("K", "(K >= 16) & Eq(Mod(K, 4), 0)", "at least 16, a multiple of 4"),
)

W16_24 = KernelRow(
    name="w16_24",
    op="llmc.fused",
    template="w16_24.py.j2",
    summary="2:4 sparse fp16 or bf16 weights: kept values and keep masks, spread in registers",
    args=linear_args(
        Argument("values", "[Np/64, Kp/128, 2, 64, 16]", ("i32",), dtype="i32"),
        Argument("keep", "[Np/64, Kp/128, 64, 16]", ("i8",), dtype="i8"),
        SCALE,
    ),
    step=128,
    choices={
        **CHOICES,
        "x_dtype": ("fp16", "bf16"),
        "scale_dtype": ("",),
        "asym": (False,),
        "weights": ("dense",),
    },
    requires=(*NM, *SHAPE),
    moves=f"9*Np*Kp/8 + {SIDES}",
    tiles=((8, 32), (8, 64), (8, 128), (16, 32), (16, 64), (16, 128), (32, 64)),
    stages=(2, 3, 4),
    splits=SPLITS,
    fits=(BESIDE,),
    pack=_dense,
)

W8A16_24 = KernelRow(
    name="w8a16_24",
    op="llmc.fused",
    template="w8a16_24.py.j2",
    summary="2:4 sparse 8-bit weights: kept codes and keep masks, spread in registers",
    args=linear_args(
        Argument("codes", "[Np/64, Kp/256, 2, 64, 16]", ("i32",), dtype="i32"),
        Argument("keep", "[Np/64, Kp/256, 64, 16]", ("i16",), dtype="i16"),
        SCALE,
    ),
    step=256,
    choices=CHOICES,
    requires=(
        Requirement("bits", "Eq(bits, 8)", "8"),
        *NM,
        Requirement(
            "group",
            "Eq(Mod(group, 256), 0) | Eq(group, 64) | Eq(group, 128)",
            "64, 128, a multiple of 256 dense columns, or one scale per row",
        ),
        *SHAPE,
    ),
    moves=f"5*Np*Kp/8 + {SIDES}",
    tiles=((8, 32), (8, 64), (16, 32), (16, 64), (16, 128)),
    stages=(2, 3, 4),
    splits=SPLITS,
    # Zero points of bf16 in wide tiles would send weights through memory.
    fits=(
        "Eq(wide, 0) | (BM <= 16)",
        "Eq(asym, 0) | (BN <= 64)",
        BESIDE,
    ),
    pack=_bytes,
)
