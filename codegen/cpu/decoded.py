"""Weights that no kernel of torch reads: tables, odd groups, factors, and those stored dense.

Tables and codes are decoded a block of rows at a time, in the dtype of x, and multiplied while they
are in the cache. A byte holds two codes, so one look into a table of 256 pairs gives two weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...compiler.ir import packing
from ...compiler.ir.levels import levels as named_levels
from .. import meaning
from ..problem import DTYPES, Parts, Problem
from .kernel import CpuKernel, Tensors, dense_codes

_AT_ONCE = 1 << 20  # weights decoded together
_WORDS = {2: torch.int32, 4: torch.int64}  # that hold a pair of floats


def _dtype(problem: Problem) -> torch.dtype:
    return DTYPES[problem.x_dtype]


def _misfit(problem: Problem) -> str | None:
    if problem.weights not in ("int", "table") or problem.bitmap:
        return f"weights={problem.weights}{' bitmap' * problem.bitmap}, expected codes"
    if problem.weights == "table" and problem.m:
        return f"{problem.n}:{problem.m} sparse, expected dense codes of a table"
    if not 1 <= problem.bits <= 8:
        return f"bits={problem.bits}, expected 1 to 8"
    if problem.x_dtype not in DTYPES:
        return f"x_dtype={problem.x_dtype}, expected one of {', '.join(DTYPES)}"
    return None


def _pack(problem: Problem, parts: Parts) -> Tensors:
    """codes uint8, two in a byte where they fit; scale, moved = (middle - zero)·scale, table."""
    dtype = _dtype(problem)
    packed: Tensors = {}
    if problem.weights == "int":
        q, zero = dense_codes(problem, parts)
        middle = float(1 << (problem.bits - 1))
        if problem.asym:
            packed["moved"] = ((middle - zero) * parts["scale"].float()).to(dtype).contiguous()
        table = (torch.arange(1 << problem.bits) - middle)[None]
    else:
        q = packing.unpack(parts["codes"], problem.bits, problem.K)
        own = parts.get("table")
        table = named_levels(problem.levels, problem.bits)[None] if own is None else own
    if problem.scale_dtype and "scale" in parts:
        packed["scale"] = parts["scale"].to(dtype).contiguous()
    if problem.bits > 4:
        return packed | {"codes": q.contiguous(), "table": table.to(dtype).contiguous()}
    table = torch.nn.functional.pad(table.float(), (0, 16 - table.shape[1])).to(dtype)
    if len(table) == 1:
        low, high = table[0].repeat(16), table[0].repeat_interleave(16)
        table = torch.stack([low, high], -1).view(_WORDS[dtype.itemsize])
    codes = packing.pack(q, 4).view(torch.uint8)
    return packed | {"codes": codes.contiguous(), "table": table.contiguous()}


def _values(
    problem: Problem, packed: Mapping[str, torch.Tensor], now: slice, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of W [n, K], contiguous."""
    codes, table = packed["codes"][now], packed["table"]
    count = len(codes)
    if problem.bits <= 4 and table.dtype in _WORDS.values():
        pairs = table.view(-1).index_select(0, codes.to(torch.int32).view(-1))
        values = pairs.view(dtype).view(count, -1)[:, : problem.K]
    else:
        if problem.bits <= 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).view(count, -1)[:, : problem.K]
        if problem.weights == "int":
            values = codes.to(dtype).sub_(1 << (problem.bits - 1))
        else:
            at = codes.to(torch.int32)
            if len(table) > 1:
                rows = torch.arange(now.start, now.stop, dtype=torch.int32)
                at = at + rows[:, None] * table.shape[1]
            values = table.view(-1).index_select(0, at.reshape(-1)).view(count, problem.K)
    if "scale" not in packed:
        return values
    scale, moved = packed["scale"][now], packed["moved"][now] if "moved" in packed else None
    group = problem.dense_group or problem.K
    if problem.K % group == 0:
        shaped = values.unflatten(1, (-1, group))
        scale = scale[..., None]
        moved = None if moved is None else moved[..., None]
    else:
        which = torch.arange(problem.K) // group
        shaped, scale = values, scale[:, which]
        moved = None if moved is None else moved[:, which]
    shaped = shaped * scale if moved is None else torch.addcmul(moved, shaped, scale)
    return shaped.reshape(count, problem.K)


def _decode(problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    y = x.new_empty(len(x), problem.N)
    step = max(1, _AT_ONCE // problem.K)
    for at in range(0, problem.N, step):
        now = slice(at, min(at + step, problem.N))
        torch.mm(x, _values(problem, packed, now, x.dtype).t(), out=y[:, now])
    return y


def _dense_misfit(problem: Problem) -> str | None:
    return None if problem.weights == "dense" else f"weights={problem.weights}, expected dense"


def _pack_dense(problem: Problem, parts: Parts) -> Tensors:
    return {"weight": meaning.weight(problem, parts, _dtype(problem)).contiguous()}


def _linear(problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.linear(x, packed["weight"])


def _factors_misfit(problem: Problem) -> str | None:
    return None if problem.weights == "factors" else f"weights={problem.weights}, expected factors"


def _pack_factors(problem: Problem, parts: Parts) -> Tensors:
    return {name: parts[name].to(_dtype(problem)).contiguous() for name in ("left", "right")}


def _factors(problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    few = torch.nn.functional.linear(x, packed["right"])
    return torch.nn.functional.linear(few, packed["left"])


DECODED = CpuKernel(
    "decode + aten::mm", _misfit, _pack, {"decode": _decode}, ((1, "decode"),),
    lambda p: f"{p.weights}{p.bits}", note="decoded in every call, a block of rows at a time",
)  # fmt: skip
DENSE = CpuKernel(
    "aten::linear", _dense_misfit, _pack_dense, {"linear": _linear}, ((1, "linear"),),
    lambda p: "dense", note="held dense: zeros save size on disk, not memory or time here",
)  # fmt: skip
FACTORS = CpuKernel(
    "aten::linear x2", _factors_misfit, _pack_factors, {"linear": _factors}, ((1, "linear"),),
    lambda p: "factors", note="two products, in the dtype of x",
)  # fmt: skip
