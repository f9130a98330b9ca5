"""What a problem means: the oracle of every kernel, composed of the references of op rows.

It takes canonical parts, never packed ones, and computes in the dtype of x; in fp64 its own error
is nothing beside a kernel's.
"""

from __future__ import annotations

from typing import Any

import torch

from ..compiler.ir import packing
from ..compiler.ir.ops.compressed import dequantize
from ..compiler.ir.ops.lookup import lookup, sum_signs
from ..compiler.ir.ops.pairs import decode_pairs
from ..compiler.ir.ops.rotation import mix
from ..compiler.ir.ops.rounding import FLOATS, round_input
from ..compiler.ir.ops.semantic import activation, experts, gated, layer_norm, rms_norm
from ..compiler.ir.ops.sparse import csr_linear
from . import coded
from .mixture.choice import choose, read_choice
from .mixture.fit import picked
from .problem import Parts, Problem


def weight(problem: Problem, parts: Parts, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """W [N, K] in ``dtype``, without what stands beside the codes."""
    group = problem.group if problem.group > 0 else problem.columns
    how: Any = {"bits": problem.bits, "group": group, "columns": problem.columns, "dtype": dtype}
    if problem.weights == "int":
        values = dequantize(parts["codes"], parts["scale"], parts.get("zero"), **how)
    elif problem.weights == "table":
        scale, table = parts.get("scale"), parts.get("table")
        values = lookup(parts["codes"], scale, table, levels=problem.levels, **how)
    elif problem.weights == "paired":
        values = decode_pairs(parts["codes"], parts["scale"], **how)
    elif problem.weights == "signs":
        how = {"group": group, "columns": problem.columns, "dtype": dtype}
        values = sum_signs(parts["signs"], parts["factors"], **how)
    elif problem.weights == "dense":
        values = parts["values"].to(dtype)
    else:
        left, right = factors(problem, parts, dtype)
        return left @ right
    if problem.m:
        return packing.expand_nm(values, parts["meta"], problem.n, problem.m, problem.K)
    if problem.bitmap:
        mask = packing.unpack(parts["bitmap"], 1, problem.K).bool()
        if problem.weights != "dense":
            return values * mask
        return values.new_zeros(mask.shape).masked_scatter(mask, values)
    return values


def factors(
    problem: Problem, parts: Parts, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """left [N, rank] and right [rank, K] in ``dtype``."""
    if problem.coded:
        return coded.dense(problem, parts, dtype)
    return parts["left"].to(dtype), parts["right"].to(dtype)


def linear(
    problem: Problem, parts: Parts, x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """y [..., outputs] of x [..., K] and residual [..., outputs], in x's dtype."""
    dtype = x.dtype
    if problem.norm:
        x = normed(problem, parts, x)
    if problem.smooth:
        x = x * parts["smooth"].to(dtype)
    if problem.mixed:
        x = mix(x)
    if problem.outliers:
        apart = x[..., parts["columns"]] @ parts["column_weights"].to(dtype).T
        kept = torch.ones(problem.K, dtype=dtype).index_fill(0, parts["columns"].cpu(), 0.0)
        x = x * kept.to(x.device)
    if problem.rounds:
        x = rounded(problem, parts, x)
    y = x @ weight(problem, parts, dtype).T
    if problem.outliers:
        y = y + apart
    if problem.rank and problem.weights != "factors":
        y = y + (x @ parts["right"].to(dtype).T) @ parts["left"].to(dtype).T
    if problem.sparse:
        values = parts["csr_values"].to(dtype)
        y = csr_linear(y, x, values, parts["csr_index"], parts["csr_starts"])
    if problem.out_mixed:
        mixed = [mix(part) for part in y.split(problem.out_sections, -1)]
        y = torch.cat(mixed, -1) / parts["out_turn"].to(dtype)
    if problem.bias:
        y = y + parts["bias"].to(dtype)
    if problem.pairs == "gate":
        gate, up = y.split(problem.outputs, -1)
        y = gated(gate, up, act=problem.act)
    elif problem.act:
        y = activation(y, act=problem.act)
    if problem.out_norm:
        y = rms_norm(y, parts["out_gain"].to(dtype), eps=problem.out_eps)
    return y if residual is None else y + residual


def mixture(
    up: Problem, down: Problem, parts_up: Parts, parts_down: Parts, x: torch.Tensor,
    residual: torch.Tensor | None = None, index: torch.Tensor | None = None,
    weight_of: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y [..., outputs] of x [..., K], in its dtype: a layer of experts, of which gate and up are
    one problem and down another. index, weight_of: [T, k], where the first does not choose."""
    h = normed(up, parts_up, x) if up.norm else x
    h = h.reshape(-1, up.K)
    if up.route:
        index, weight_of = chosen(up, parts_up, h)
    assert index is not None
    assert weight_of is not None
    stacks = [
        weight(p, parts, x.dtype).reshape(p.experts, -1, p.K)
        for p, parts in ((up, parts_up), (down, parts_down))
    ]
    y = experts(h, index, weight_of, stacks[0], stacks[1], act=up.act)
    y = y.reshape(*x.shape[:-1], down.outputs)
    return y if residual is None else y + residual


def chosen(problem: Problem, parts: Parts, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and weight [T, k] of what experts read, h [T, K]."""
    wide = torch.promote_types(h.dtype, torch.float32) if problem.wide_router else h.dtype
    products, choice = h.to(wide) @ parts["router"].to(wide).T, read_choice(problem.route)
    assert choice is not None
    correction = parts.get("correction")
    return choose(choice, products, picked(problem), correction, problem.always)


def normed(problem: Problem, parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """x [..., K] behind the problem's norm, in x's dtype."""
    gain, shift = (None if t is None else t.to(x.dtype) for t in map(parts.get, ("gain", "shift")))
    if problem.centred:
        return layer_norm(x, gain, shift, eps=problem.eps)
    return rms_norm(x, gain, eps=problem.eps)


def rounded(problem: Problem, parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """x on the grid that ``rounds`` names: kind with bits, per, then group=, limit=, power."""
    word, per, *rest = problem.rounds.split(" ")
    kind, bits = grid_of(word)
    attrs = dict(w.split("=") for w in rest if "=" in w)
    return round_input(
        x, parts.get("in_scale"), kind=kind, bits=bits, per=per, power="power" in rest,
        group=int(attrs.get("group", 0)), limit=float(attrs.get("limit", 0.0)),
    )  # fmt: skip


def grid_of(word: str) -> tuple[str, int]:
    """ "int8" -> ("int", 8), "e4m3" -> ("e4m3", 8)."""
    if word in FLOATS:
        return word, FLOATS[word][0]
    kind = word.rstrip("0123456789")
    return kind, int(word[len(kind) :])
