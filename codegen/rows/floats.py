"""Weights that are small floats beside 16-bit activations: e4m3, e5m2 and e2m1."""

from __future__ import annotations

import torch

from ...compiler.ir import packing
from ...compiler.ir.errors import ModelError
from ...compiler.ir.levels import levels
from ..prepack import scale_tiles, wrap
from ..problem import Parts, Problem, Requirement
from ..row import Argument, KernelRow
from .bytes import BESIDE, CODES, DENSE, GROUP, MANY, SHAPE, SIXTEEN, TILES, byte_tiles, spread
from .common import CHOICES, SCALE, SIDES, SPLITS, linear_args


def numbers(problem: Problem, parts: Parts) -> torch.Tensor:
    """The codes of named levels, int64 [N, K]; ModelError when one stands for no number."""
    q = packing.unpack(parts["codes"], problem.bits, problem.K).to(torch.int64)
    known = levels(problem.levels, problem.bits).isfinite().to(q.device)
    if not bool(known[q].all()):
        raise ModelError(f"expected codes of {problem.levels} numbers, found one that is none")
    return q


def scales(row: KernelRow, problem: Problem, parts: Parts) -> torch.Tensor:
    """The tiles of the scales; of ones where none are stored."""
    if not problem.scale_dtype:
        device = parts["codes"].device
        parts = {**parts, "scale": torch.ones(problem.N, 1, dtype=torch.float16, device=device)}
    return scale_tiles(row, problem, parts)


def _eight(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    q = numbers(problem, parts)
    return {"codes": byte_tiles(row, q), "scale": scales(row, problem, parts)}


def _four(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """Column 32 j + 2 w + e of a step: sign in bit 15 - j, the rest from bit 9 - 3 j, of half e."""
    q = spread(row, numbers(problem, parts))
    c = torch.arange(8, device=q.device)
    j, e = c // 2, c % 2
    bits = ((q >> 3) << (15 - j + 16 * e)) | ((q & 7) << (9 - 3 * j + 16 * e))
    return {"codes": wrap(bits.sum(-1)).contiguous(), "scale": scales(row, problem, parts)}


NAMED: dict[str, tuple[object, ...]] = {
    **CHOICES,
    "scale_dtype": ("fp16", "bf16", ""),
    "asym": (False,),
    "weights": ("table",),
}
W8_FLOAT = KernelRow(
    name="w8_float",
    op="llmc.fused",
    template="wfloat.py.j2",
    summary="8-bit floats, e4m3 or e5m2, one scale per group or per row, or none",
    args=linear_args(CODES, SCALE),
    step=128,
    choices={**NAMED, "levels": ("e4m3", "e5m2")},
    requires=(Requirement("bits", "Eq(bits, 8)", "8"), DENSE, GROUP, *SHAPE),
    moves=f"Np*Kp + {SIDES}",
    tiles=TILES,
    stages=(3, 4, 6),
    splits=SPLITS,
    fits=("Eq(wide, 0) | (BM <= 16)", BESIDE, MANY, SIXTEEN),
    pack=_eight,
)

W4_FLOAT = KernelRow(
    name="w4_float",
    op="llmc.fused",
    template="wfloat.py.j2",
    summary="4-bit floats, e2m1 (FP4), one scale per group or per row, or none",
    args=linear_args(Argument("codes", "[Np/64, Kp/128, 64, 16]", ("i32",), dtype="i32"), SCALE),
    step=128,
    choices={**NAMED, "levels": ("e2m1",)},
    requires=(Requirement("bits", "Eq(bits, 4)", "4"), DENSE, GROUP, *SHAPE),
    moves=f"Np*Kp/2 + {SIDES}",
    tiles=TILES,
    stages=(3, 4, 6),
    splits=SPLITS,
    fits=("Eq(wide, 0) | (BM <= 16)", BESIDE, MANY, SIXTEEN),
    pack=_four,
)
