"""Weights whose codes stand for levels, by name or stored, and the uniform grids of 2 and 3 bits.

A kernel looks the bytes of a level up: see templates/lut.py.j2.
"""

from __future__ import annotations

import torch

from ...compiler.ir import packing
from ...compiler.ir.levels import levels as named_levels
from ..prepack import pad, wrap
from ..problem import Parts, Problem, Requirement
from ..row import TILE_ROWS, Argument, KernelRow
from .bytes import BESIDE, DENSE, GROUP, MANY, SHAPE, SIXTEEN, spread
from .common import CHOICES, SCALE, SIDES, SPLITS, linear_args
from .floats import numbers, scales


def _pack(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    if problem.levels:
        q = spread(row, numbers(problem, parts))
    else:
        q = spread(row, packing.unpack(parts["codes"], problem.bits, problem.K).to(torch.int64))
    c = torch.arange(q.shape[-1], device=q.device)
    if problem.bits == 4:
        packed = {"codes": wrap((q << (4 * c)).sum(-1)).contiguous()}
    else:
        group, i = c // 4, c % 4
        fields = (q & 3) << (16 * (group // 2) + 2 * (group % 2) + 4 * i)
        packed = {"codes": wrap(fields.sum(-1)).contiguous()}
        if problem.bits == 3:
            plane = ((q >> 2) << (4 * i + (2 + group) % 4)).sum(-1)
            plane = torch.where(plane >= 1 << 15, plane - (1 << 16), plane)
            packed["plane"] = plane.to(torch.int16).contiguous()
    if problem.weights == "table":
        table = parts["table"].float() if problem.table else _named(problem, q.device)
        if problem.table != "row":
            table = table.expand(TILE_ROWS, -1)
        packed["table"] = pad(table, TILE_ROWS, 1).contiguous()
    return {**packed, "scale": scales(row, problem, parts)}


def _named(problem: Problem, device: torch.device) -> torch.Tensor:
    return named_levels(problem.levels, problem.bits).nan_to_num(0.0).to(device)[None]


def _codes(columns: int) -> Argument:
    return Argument("codes", f"[Np/64, Kp/{columns}, 64, 16]", ("i32",), dtype="i32")


PLANE = Argument("plane", "[Np/64, Kp/256, 64, 16]", ("i16",), dtype="i16")
TABLE = Argument("table", "[64 or Np, 2**bits]", ("fp32",), dtype="fp32")
TABLES: dict[str, tuple[object, ...]] = {
    **CHOICES,
    # A level has x's own precision, so that a product of 16-bit numbers is what it means.
    "x_dtype": ("fp16", "bf16"),
    "scale_dtype": ("fp16", "bf16", ""),
    "asym": (False,),
    "weights": ("table",),
    "table": ("", "matrix", "row"),
}
GROUP256 = Requirement(
    "group",
    "Eq(Mod(group, 256), 0) | Eq(group, 16) | Eq(group, 32) | Eq(group, 64) | Eq(group, 128)",
    "16, 32, 64, 128, a multiple of 256, or one scale per row",
)


def _row(name: str, bits: int, summary: str, choices: dict[str, tuple[object, ...]]) -> KernelRow:
    step = 128 if bits == 4 else 256
    plane = (PLANE,) if bits == 3 else ()
    table = (TABLE,) if "table" in choices["weights"] else ()
    # Stored tables of 128 rows would go through shared memory in each step.
    wide = () if table else ((8, 128), (16, 128))
    # Eight products of a step and their scales would spill in the largest tile.
    most = ((64, 64),) if step == 128 else ()
    return KernelRow(
        name=name,
        op="llmc.fused",
        template="lut.py.j2",
        summary=summary,
        args=linear_args(_codes(step), *plane, *table, SCALE),
        step=step,
        choices=choices,
        requires=(
            Requirement("bits", f"Eq(bits, {bits})", str(bits)),
            DENSE,
            GROUP if step == 128 else GROUP256,
            *SHAPE,
        ),
        moves=f"{bits}*Np*Kp/8 + {4 * 2**bits if table else 0}*Tp + {SIDES}",
        tiles=((8, 32), (8, 64), (16, 32), (16, 64), *wide, (32, 64), *most),
        stages=(3, 4, 6),
        splits=SPLITS,
        fits=("Eq(wide, 0) | (BM * BN <= 1024)", BESIDE, MANY, SIXTEEN),
        pack=_pack,
    )


W4_LUT = _row(
    "w4_lut", 4, "4-bit codes of 16 levels: NF4 and other named ones, or a table stored once "
    "or per row", {**TABLES, "levels": ("nf", "midrise", "")},
)  # fmt: skip
W3_LUT = _row(
    "w3_lut", 3, "3-bit codes of 8 levels, by name or stored",
    {**TABLES, "levels": ("nf", "midrise", "")},
)  # fmt: skip
W2_LUT = _row(
    "w2_lut", 2, "2-bit codes of 4 levels, by name or stored",
    {**TABLES, "levels": ("nf", "midrise", "ternary", "")},
)  # fmt: skip
INTEGERS: dict[str, tuple[object, ...]] = {**CHOICES, "weights": ("int",)}
W3A16 = _row("w3a16", 3, "3-bit weights, symmetric or with zero points", INTEGERS)
W2A16 = _row("w2a16", 2, "2-bit weights, symmetric or with zero points", INTEGERS)
