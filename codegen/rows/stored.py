"""Dense weights as they were captured: nothing is decoded, what stands around them is fused."""

from __future__ import annotations

import torch

from ...compiler.ir.errors import ModelError
from ..prepack import expect
from ..problem import DTYPES, Parts, Problem, Requirement
from ..row import Argument, KernelRow
from .bytes import BESIDE, DENSE, TILES
from .common import AROUND, CHOICES, FLOATS, SPLITS, linear_args


def _pack(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """The very tensor that the weight is, where its rows lie one after the other."""
    values = parts["values"]
    expect("values", values, (problem.N, problem.K))
    if values.dtype != DTYPES[problem.x_dtype]:
        raise ModelError(f"expected {DTYPES[problem.x_dtype]} values, found {values.dtype}")
    return {"values": values.contiguous()}


W16 = KernelRow(
    name="w16",
    op="llmc.fused",
    template="w16.py.j2",
    summary="dense fp16, bf16 or fp32 weights as they were captured, for what is fused around them",
    args=linear_args(Argument("values", "[N, K]", FLOATS)),
    step=128,
    choices={
        **CHOICES,
        "out_mixed": ("",),
        "scale_dtype": ("",),
        "asym": (False,),
        "weights": ("dense",),
    },
    requires=(
        Requirement("bits", "Eq(bits, 16) | Eq(bits, 32)", "16 or 32"),
        DENSE,
        Requirement("N", "N >= 1", "at least 1"),
        Requirement("K", "(K >= 16) & Eq(Mod(K, 8), 0)", "at least 16, a multiple of 8"),
    ),
    moves=f"xb*N*K + {AROUND}",
    tiles=TILES,
    stages=(3, 4, 5),
    splits=SPLITS,
    fits=(
        "Eq(wide, 0) | ((BM <= 8) & (BN <= 64)) | ((BM <= 16) & Eq(BN, 64) & Eq(rank, 0))",
        "(BM < 64) | Eq(norm, 0)",
        BESIDE,
    ),
    pack=_pack,
    as_stored=True,
)
