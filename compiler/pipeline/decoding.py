"""The decode step of each grid: which op reads which packed parameters, and what lies in them.

:func:`emit` writes the graph while planning, :func:`pieces` the tensors after the solve, and
:func:`decoded` reads tensors back by the op's own reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..ir import packing
from ..ir.errors import LlmcError
from ..ir.graph import Program
from ..ir.ops.compressed import dequantize, groups_of
from ..ir.ops.lookup import decode_scales, lookup, sum_signs
from ..ir.ops.pairs import decode_pairs
from ..ir.scheme import Codes
from ..ir.types import DTYPES
from ..solvers import Solution
from ..solvers.double import BLOCK

SUFFIXES = ("codes", "scale", "zero", "table", "signs", "factors", "scale_codes", "step", "mean")
"""Ends of the names of what the decode steps read."""

NewPiece = Callable[[str, tuple[int, ...], torch.dtype], fx.Node]


def emit(
    program: Program, codes: Codes, new_piece: NewPiece, rows: int, columns: int, group: int,
    **where: Any,
) -> fx.Node:  # fmt: skip
    """Emit the decode of a [rows, columns] matrix.

    Args:
        new_piece: makes a parameter from its suffix, shape and dtype. group: columns per scale.
        where: where the calls go, as for `Program.emit`.
    """
    groups, stored = groups_of(columns, group), DTYPES[codes.scale_dtype]
    shared = {"group": group, "columns": columns, "dtype": program.dtype, **where}
    if codes.grid == "signs":
        words = packing.packed_words(columns, 1)
        signs = new_piece("signs", (codes.bits, rows, words), torch.int32)
        factors = new_piece("factors", (codes.bits, rows, groups), stored)
        return program.emit("llmc.sum_signs", signs, factors, **shared)
    words = packing.packed_words(columns, codes.bits)
    packed = new_piece("codes", (rows, words), torch.int32)
    scale: fx.Node | None = None
    if codes.double:
        steps = groups_of(rows * groups, BLOCK)
        parts = [
            new_piece("scale_codes", (rows * groups,), torch.uint8),
            new_piece("step", (steps,), torch.float32),
            new_piece("mean", (1,), torch.float32),
        ]
        scale = program.emit(
            "llmc.decode_scales", *parts, block=BLOCK, rows=rows, columns=groups, **where
        )
    elif codes.scaled:
        scale = new_piece("scale", (rows, groups), stored)
    if codes.grid == "uniform":
        given = [packed, scale]
        if not codes.symmetric:
            given.append(new_piece("zero", (rows, groups), torch.uint8))
        return program.emit("llmc.dequantize", *given, bits=codes.bits, **shared)
    if codes.grid == "pairs":
        return program.emit("llmc.decode_pairs", packed, scale, bits=codes.bits, **shared)
    if codes.tables is None:
        return program.emit(
            "llmc.lookup", packed, scale, bits=codes.bits, levels=codes.grid, **shared
        )
    tables = (rows if codes.tables == "row" else 1, 1 << codes.bits)
    table = new_piece("table", tables, torch.float16 if codes.scaled else stored)
    return program.emit("llmc.lookup", packed, scale, table, bits=codes.bits, **shared)


def pieces(codes: Codes, q: Tensor, solution: Solution) -> dict[str, Tensor]:
    """What is stored, by suffix. q: uint8 [rows, columns], the codes of what is not dropped.

    Raises:
        LlmcError: the solver gave less than the grid stores.
    """
    if codes.grid == "signs":
        planes = torch.stack([(q >> i) & 1 for i in range(codes.bits)])
        return {"signs": packing.pack(planes, 1), "factors": _given(solution.table)}
    out = {"codes": packing.pack(q, codes.bits)}
    if codes.double:
        double = solution.double
        if double is None:
            raise LlmcError("expected 8-bit scales from the solver, found none")
        out |= {"scale_codes": double.codes, "step": double.step, "mean": double.mean}
    elif codes.scaled:
        out["scale"] = _given(solution.scale)
    if solution.zero is not None:
        out["zero"] = solution.zero
    if codes.tables is not None:
        out["table"] = _given(solution.table)
    return out


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise LlmcError("expected scales or levels from the solver, found none")
    return tensor


def decoded(
    codes: Codes, parts: Mapping[str, Tensor], rows: int, columns: int, group: int
) -> Tensor:
    """fp32 [rows, columns] from `pieces`, as the graph decodes them."""
    shared: dict[str, Any] = {"group": group, "columns": columns}
    if codes.grid == "signs":
        return sum_signs(parts["signs"], parts["factors"], **shared)
    scale = parts.get("scale")
    if codes.double:
        given = (parts["scale_codes"], parts["step"], parts["mean"])
        groups = groups_of(columns, group)
        scale = decode_scales(*given, block=BLOCK, rows=rows, columns=groups)
    if codes.grid == "uniform":
        assert scale is not None
        return dequantize(parts["codes"], scale, parts.get("zero"), bits=codes.bits, **shared)
    if codes.grid == "pairs":
        assert scale is not None
        return decode_pairs(parts["codes"], scale, bits=codes.bits, **shared)
    table = parts.get("table")
    name = "" if table is not None else codes.grid
    return lookup(parts["codes"], scale, table, bits=codes.bits, levels=name, **shared)
