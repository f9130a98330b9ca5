"""Weights that are sums of signs: planes of one bit per weight, a factor per plane and group."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...compiler.ir import packing
from ..prepack import expect, scale_tiles
from ..problem import DTYPES, Parts, Problem, Requirement
from ..row import Argument, KernelRow
from .bytes import BESIDE, DENSE, MANY, SHAPE, TILES, spread
from .common import AROUND, CHOICES, SCALE, SPLITS, linear_args


def _planes(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    signs, factors = parts.get("signs"), parts.get("factors")
    words = packing.packed_words(problem.K, 1)
    expect("signs", signs, (problem.bits, problem.N, words))
    expect("factors", factors, (problem.bits, problem.N, problem.groups))
    assert signs is not None
    assert factors is not None
    return _packed(row, problem, signs, factors.to(DTYPES[problem.scale_dtype]))


def _binary(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    codes, scale = parts["codes"], parts.get("scale")
    if scale is None:
        scale = torch.ones(problem.N, 1, dtype=torch.float16, device=codes.device)
    return _packed(row, problem, codes[None], scale[None])


def _packed(
    row: KernelRow, problem: Problem, signs: torch.Tensor, factors: torch.Tensor
) -> dict[str, torch.Tensor]:
    """signs [b, N, words] and factors [b, N, G] -> codes int16 [Np/64, Kp/256, b, 64, 16] and
    scale int32 [Np/64, Gp, ceil(b/2), 64]: factors of planes 2 i and 2 i + 1 in one word.

    Column 32 j + 2 w + e of a step is bit j of byte e of half w.
    """
    c = torch.arange(16, device=signs.device)
    places = c // 2 + 8 * (c % 2)
    planes = []
    for plane in signs:
        q = spread(row, packing.unpack(plane, 1, problem.K).to(torch.int64))
        halves = (q << places).sum(-1)
        planes.append(torch.where(halves >= 1 << 15, halves - (1 << 16), halves).to(torch.int16))
    pairs = []
    for i in range(0, len(factors), 2):
        pair = {"scale": factors[i]}
        if i + 1 < len(factors):
            other = factors[i + 1].contiguous().view(torch.int16)
            pair["zero"] = other.to(torch.int64) & 0xFFFF
        pairs.append(scale_tiles(row, problem, pair))
    codes, scale = torch.stack(planes, 2).contiguous(), torch.stack(pairs, 2).contiguous()
    return {"codes": codes, "scale": scale}


CODES = Argument("codes", "[Np/64, Kp/256, bits, 64, 16]", ("i16",), dtype="i16")
FACTORS_OF = Argument("scale", "[Np/64, Gp, ceil(bits/2), 64]", ("i32",), dtype="i32")
GROUP = Requirement(
    "group",
    "Eq(Mod(group, 256), 0) | Eq(group, 32) | Eq(group, 64) | Eq(group, 128)",
    "32, 64, 128, a multiple of 256, or one factor per row",
)
# The sums of each plane are in registers of their own; those of small groups all at once.
FITS = (
    "Eq(wide, 0) | (BM * BN <= 1024)",
    "Eq(wide, 0) | (BM * BN <= 256) | Eq(norm, 0) | (group >= 64) | Eq(group, 0)",
    "(bits * BM * BN <= 4096) & ((BM * BN <= 2048) | Eq(norm, 0))",
    "((bits * BM <= 48) & (bits * BM * BN <= 3072)) | (group >= 64) | Eq(group, 0)",
    BESIDE,
    MANY,
)

W_SIGNS = KernelRow(
    name="w_signs",
    op="llmc.fused",
    template="signs.py.j2",
    summary="sums of 1 to 5 planes of signs, a factor of each per group or per row",
    args=linear_args(CODES, FACTORS_OF),
    step=256,
    # Three products of tf32 for each plane would fill the registers of any tile.
    choices={
        **CHOICES, "x_dtype": ("fp16", "bf16"), "asym": (False,),
        "weights": ("signs",),
    },
    requires=(
        Requirement("bits", "(bits >= 1) & (bits <= 5)", "1 to 5 planes"), DENSE, GROUP, *SHAPE,
    ),
    moves=f"bits*Np*Kp/8 + {AROUND} + 4*ceiling(bits/2)*Gp*Np",
    tiles=TILES,
    stages=(3, 4, 6),
    splits=SPLITS,
    fits=FITS,
    pack=_planes,
)  # fmt: skip

W1_BINARY = replace(
    W_SIGNS,
    name="w1_binary",
    summary="weights of -1 and 1 times a scale per group or per row, or none",
    args=linear_args(CODES, SCALE),
    choices={
        **CHOICES, "scale_dtype": ("fp16", "bf16", ""), "asym": (False,), "weights": ("table",),
        "levels": ("binary",),
    },
    requires=(Requirement("bits", "Eq(bits, 1)", "1"), DENSE, GROUP, *SHAPE),
    moves=f"Np*Kp/8 + {AROUND} + 4*Gp*Np",
    pack=_binary,
)  # fmt: skip
