"""A weight that is a product of two factors, multiplied in one launch: y = (x · rightᵀ) · leftᵀ."""

from __future__ import annotations

import torch

from ..prepack import low_rank
from ..problem import Parts, Problem, Requirement
from ..row import KernelRow
from .common import AROUND, CHOICES, UNROUTED, UpTo, linear_args


def _pack(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    return low_rank(problem, parts)


FACTORS = KernelRow(
    name="factors",
    op="llmc.fused",
    template="factors.py.j2",
    summary="two dense factors: programs share the product with the first, then go on with theirs",
    args=linear_args(),
    step=128,
    choices={
        **CHOICES,
        "out_mixed": ("",),
        **UNROUTED,
        "scale_dtype": ("",),
        "asym": (False,),
        "weights": ("factors",),
        "rank": UpTo(16384, least=1),
    },
    requires=(
        Requirement("bits", "bits >= 16", "16 or 32"),
        Requirement("m", "Eq(m, 0)", "0 (dense)"),
        Requirement("N", "N >= 1", "at least 1"),
        Requirement("K", "K >= 16", "at least 16"),
    ),
    moves=AROUND,
    tiles=((8, 32), (8, 64), (16, 32), (16, 64), (32, 64)),
    stages=(3, 4, 6),
    fits=("Eq(wide, 0) | (BM <= 8)",),
    pack=_pack,
)
