"""e4m3 weights times e4m3 inputs."""

from __future__ import annotations

import dataclasses

import torch

from ...compiler.ir import packing
from ..grids import Grids
from ..prepack import scale_tiles
from ..problem import Parts, Problem, Requirement
from ..row import KernelRow
from . import rounded
from .rounded import E4M3, STEP

_REQUIRES = (Requirement("bits", "Eq(bits, 8)", "8"), *rounded.REQUIRES)
_WEIGHTS: dict[str, tuple[object, ...]] = {"weights": ("table",), "levels": ("e4m3",)}


def pack(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """Codes, which are the floats' own bits, the scales, and what rounding x needs."""
    q = packing.unpack(parts["codes"], 8, problem.K).to(torch.uint8).view(torch.int8)
    scale = scale_tiles(row, problem, parts)
    return {
        "codes": rounded.byte_tiles(q).view(torch.float8_e4m3fn),
        "scale": scale,
        **rounded.grid_tensors(problem, parts),
    }


FP8_CODES = KernelRow(
    name="fp8_codes",
    op="llmc.fused",
    template="products8.py.j2",
    summary="e4m3 weights times the e4m3 codes of x that round_e4m3 made",
    args=rounded.product_args("fp8e4nv"),
    step=STEP,
    choices=rounded.choices(("",), rounded=Grids(*E4M3, limits=True), **_WEIGHTS),
    requires=_REQUIRES,
    moves=rounded.CODES_MOVE,
    tiles=rounded.TILES[:-1],  # a second sum per tile leaves no room for the largest
    stages=(2, 3, 4),  # the largest tile has room for three
    fits=rounded.FITS,
    pack=pack,
    product="fp8",
    targets=("sm_90",),
)

FP8 = dataclasses.replace(
    FP8_CODES,
    name="fp8",
    summary="e4m3 weights times x put on e4m3, per token or with a stored scale",
    args=rounded.args("fp8e4nv"),
    choices=rounded.choices(Grids(*E4M3, limits=True), **_WEIGHTS),
    moves=f"Np*Kp + {rounded.SIDES}",
    call=rounded.call(rounded.ROUND_E4M3, FP8_CODES),
    inner=rounded.inner(FP8_CODES),
)
