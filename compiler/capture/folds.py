"""Exact rewrites towards what a model's config can say: kept divisors, eps and scale constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..ir.errors import UsageError
from ..ir.graph import Program, info, tensor_type
from ..ir.ops import row_of
from .bisimulate import constant_values, evaluate

_MADE_BY = "write_back"
# They move elements about, or cut some off, and change no value.
_VIEWS = {
    "aten.reshape.default", "aten.transpose.int", "aten.permute.default", "aten.slice.Tensor",
    "aten.unsqueeze.default", "aten.squeeze.dim", "aten.select.int",
}  # fmt: skip


def fold_counts(program: Program) -> None:
    """Norms that keep the divisor of a wider row get the divisor of their own, in place.

    With d the kept divisor and d' the width: g' = √(d/d')·g and ε' = ε·d/d' (algorithms.md §2.15).

    Raises:
        UsageError: a norm that cannot take it: no gain, or a layer norm.
    """
    for node in list(program.calls()):
        name = row_of(node).name
        if name not in ("llmc.rms_norm", "llmc.layer_norm") or node.kwargs.get("count") is None:
            continue
        x, *rest = node.args
        assert isinstance(x, fx.Node)
        width, count = tensor_type(x).shape[-1], node.kwargs["count"]
        assert isinstance(width, int)
        assert isinstance(count, int)
        kwargs = {k: v for k, v in node.kwargs.items() if k != "count"}
        if width != count:
            where = info(node).path or f"node {node.name}"
            if name == "llmc.layer_norm":
                raise UsageError(
                    f"expected norms over as many channels as they divide by, found a LayerNorm "
                    f"over {width} that divides by {count}", where=where,
                    hint="its variance has no scalar fold: keep the hidden channels, or compile a "
                    "model with RMSNorm",
                )  # fmt: skip
            gain = rest[0] if rest else None
            if not isinstance(gain, fx.Node):
                raise UsageError(
                    f"expected a norm with a gain to take √({count}/{width}), found none",
                    where=where, hint="keep the hidden channels",
                )  # fmt: skip
            ratio, offset = count / width, float(kwargs.get("offset", 0.0))  # type: ignore[arg-type]
            node.args = (x, _times(program, gain, math.sqrt(ratio), offset, node), *rest[1:])
            kwargs["eps"] = float(kwargs["eps"]) * ratio  # type: ignore[arg-type]
        node.kwargs = kwargs


def _times(program: Program, gain: fx.Node, by: float, offset: float, at: fx.Node) -> fx.Node:
    """A gain g' with offset + g' = by · (offset + g)."""
    new = program.emit("aten.mul.Tensor", gain, by, before=at, made_by=_MADE_BY, like=at)
    if offset:
        more = (by - 1.0) * offset
        new = program.emit("aten.add.Tensor", new, more, before=at, made_by=_MADE_BY, like=at)
    return new


def move_eps(program: Program, norm: str, eps: float) -> bool:
    """Give one root-mean-square norm another eps, in place; its input's writer takes the scale.

    norm(x; ε) = norm(t·x; t²·ε), so the linear before it is scaled by t = √(eps/ε).

    Returns:
        Whether it could: the input is a linear's, through views, and nobody else reads it.
    """
    node = program.node(norm)
    if row_of(node).name != "llmc.rms_norm" or not float(str(node.kwargs["eps"])) > 0 < eps:
        return False
    by = math.sqrt(eps / float(str(node.kwargs["eps"])))
    at: Any = node.args[0]
    while at.op == "call_function" and row_of(at).name in _VIEWS and len(at.users) == 1:
        at = at.args[0]
    if at.op != "call_function" or row_of(at).name != "aten.linear.default" or len(at.users) != 1:
        return False
    x, *stored = at.args
    if not set(stored) - {None} <= constant_values(program):
        return False
    at.args = (x, *(p and _times(program, p, by, 0.0, at) for p in stored))
    node.kwargs = {**node.kwargs, "eps": eps}
    return True


def move_scale(program: Program, constant: str, value: torch.Tensor) -> bool:
    """Give a scalar factor of an embedding another value, in place; the table takes the rest.

    Where the table is the head too, the norm before the head takes the inverse.

    Returns:
        Whether it could: every reader of the scalar multiplies an embedding by it.
    """
    scalar = program.node(constant)
    ours = evaluate(program, scalar)
    if ours.numel() != 1 or value.numel() != 1 or not bool(value):
        return False
    by = float(ours.double() / value.double())
    tables = []
    for user in scalar.users:
        looked: Any = user.args[0]
        if user.op != "call_function" or row_of(user).name != "aten.mul.Tensor":
            return False
        if looked.op != "call_function" or row_of(looked).name != "aten.embedding.default":
            return False
        if program.param_of(looked.args[0]) is None or len(looked.users) != 1:
            return False
        tables.append((user, looked))
    for user, looked in tables:
        table: Any = looked.args[0]
        heads = [u for u in table.users if u is not looked]
        if not all(_under_norm(program, h, table) for h in heads):
            return False
        new = program.emit(
            "aten.mul.Tensor", table, by, before=looked, made_by=_MADE_BY, like=looked
        )
        looked.args = (new, *looked.args[1:])
        for head in heads:
            norm: Any = head.args[0]
            offset = float(norm.kwargs.get("offset", 0.0))
            gain = _times(program, norm.args[1], 1.0 / by, offset, norm)
            norm.args = (norm.args[0], gain, *norm.args[2:])
            head.args = (norm, new, *head.args[2:])
        fresh = program.emit(
            "aten.mul.Tensor", scalar, 1.0 / by, before=user, made_by=_MADE_BY, like=user
        )
        user.args = (looked, fresh)
    return True


def _under_norm(program: Program, head: fx.Node, table: fx.Node) -> bool:
    """Whether a reader of the table is a linear without bias over a norm with a stored gain."""
    if head.op != "call_function" or row_of(head).name != "aten.linear.default":
        return False
    norm, weight, *bias = head.args
    if weight is not table or any(b is not None for b in bias) or not isinstance(norm, fx.Node):
        return False
    gained = norm.op == "call_function" and row_of(norm).name == "llmc.rms_norm"
    return gained and len(norm.users) == 1 and len(norm.args) > 1
