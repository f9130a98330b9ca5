"""Weights of outlier-victim pairs: of two neighbours integers, or a float beyond them and 0."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...compiler.ir import packing
from ...compiler.ir.errors import ModelError
from ...compiler.ir.ops.pairs import broken_pairs
from ..prepack import scale_tiles
from ..problem import Parts, Problem, Requirement
from ..row import KernelRow
from .common import CHOICES, UNROUTED
from .floats import W4_FLOAT
from .int4 import dense_tiles


def _pack(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """The codes as those of `w4a16`, and four times the scales: the kernel reads quarters.

    ModelError when a pair stands for nothing, or a scale is too large for its dtype then.
    """
    codes = parts["codes"]
    broken = broken_pairs(codes, problem.bits, problem.K)
    if broken:
        raise ModelError(f"expected pairs with one victim at most, found {broken} others")
    scale = parts["scale"] * 4
    if not bool(scale.isfinite().all()):
        largest = float(parts["scale"].abs().max())
        raise ModelError(f"expected scales below a quarter of {scale.dtype}'s, found {largest:g}")
    q = packing.unpack(codes, problem.bits, problem.K).to(torch.int64)
    tiles = scale_tiles(row, problem, {**parts, "scale": scale})
    return {"codes": dense_tiles(row, q), "scale": tiles}


W4_PAIRS = replace(
    W4_FLOAT,
    name="w4_pairs",
    template="wpairs.py.j2",
    summary="4-bit outlier-victim pairs, one scale per group or per row",
    choices={**CHOICES, **UNROUTED, "asym": (False,), "weights": ("paired",)},
    requires=(*W4_FLOAT.requires, Requirement("K", "Eq(Mod(K, 2), 0)", "even")),
    # Codes of eight columns at a time take registers.
    fits=(*W4_FLOAT.fits, "(BM * BN <= 2048) | (group >= 64) | Eq(group, 0) | Eq(norm, 0)"),
    pack=_pack,
)
