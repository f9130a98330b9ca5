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
from ..ir.ops.bilevel import decode_bilevel
from ..ir.ops.compressed import dequantize, groups_of
from ..ir.ops.lookup import decode_scales, lookup, sum_signs
from ..ir.ops.pairs import decode_pairs
from ..ir.scheme import Codes
from ..ir.types import DTYPES
from ..solvers import Solution
from ..solvers.double import BLOCK, ROWS, BilevelScales, DoubleScales

SUFFIXES = ("codes", "scale", "zero", "table", "signs", "factors", "scale_codes", "step", "mean",
            "low", "zero_codes")  # fmt: skip
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
    elif codes.bilevel:
        scale = _bilevel(program, "scale_codes", codes.bilevel, new_piece, rows, groups, **where)
    elif codes.scaled:
        scale = new_piece("scale", (rows, groups), stored)
    if codes.grid == "uniform":
        given = [packed, scale]
        if codes.bilevel and not codes.symmetric:
            zero = _bilevel(program, "zero_codes", codes.bits, new_piece, rows, groups, **where)
            given.append(zero)
        elif not codes.symmetric:
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


def _bilevel(
    program: Program, name: str, bits: int, new_piece: NewPiece, rows: int, groups: int,
    **where: Any,
) -> fx.Node:  # fmt: skip
    """Emit the decode of scales, or of zero points, which have no steps of their own."""
    words, blocks = packing.packed_words(rows, bits), groups_of(rows, ROWS)
    given = [new_piece(name, (groups, words), torch.int32)]
    if name == "scale_codes":
        given += [new_piece(part, (groups, blocks), torch.float16) for part in ("step", "low")]
    return program.emit("llmc.decode_bilevel", *given, bits=bits, block=ROWS, columns=rows, **where)


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
        if not isinstance(double, DoubleScales):
            raise LlmcError("expected 8-bit scales from the solver, found none")
        out |= {"scale_codes": double.codes, "step": double.step, "mean": double.mean}
    elif codes.bilevel:
        made = solution.double
        if not isinstance(made, BilevelScales):
            raise LlmcError("expected bilevel scales from the solver, found none")
        scales = packing.pack(made.codes, codes.bilevel)
        out |= {"scale_codes": scales, "step": made.step, "low": made.low}
        if solution.zero is not None:
            out["zero_codes"] = packing.pack(solution.zero.t().contiguous(), codes.bits)
    elif codes.scaled:
        out["scale"] = _given(solution.scale)
    if solution.zero is not None and not codes.bilevel:
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
    scale, zero = parts.get("scale"), parts.get("zero")
    if codes.bilevel:
        how: dict[str, Any] = {"block": ROWS, "columns": rows}
        given = (parts["scale_codes"], parts["step"], parts["low"])
        scale = decode_bilevel(*given, bits=codes.bilevel, **how)
        if not codes.symmetric:
            zero = decode_bilevel(parts["zero_codes"], bits=codes.bits, **how)
    if codes.double:
        given = (parts["scale_codes"], parts["step"], parts["mean"])
        groups = groups_of(columns, group)
        scale = decode_scales(*given, block=BLOCK, rows=rows, columns=groups)
    if codes.grid == "uniform":
        assert scale is not None
        return dequantize(parts["codes"], scale, zero, bits=codes.bits, **shared)
    if codes.grid == "pairs":
        assert scale is not None
        return decode_pairs(parts["codes"], scale, bits=codes.bits, **shared)
    table = parts.get("table")
    name = "" if table is not None else codes.grid
    return lookup(parts["codes"], scale, table, bits=codes.bits, levels=name, **shared)
