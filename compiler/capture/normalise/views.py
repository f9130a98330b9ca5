"""Simplifying views: one transpose, one reshape, no empty pieces, constant gathers as slices."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from ...ir.dims import same_shape
from ...ir.graph import Program, tensor_type
from ...ir.ops import row_of
from ..sources import LeafWeights

_MADE_BY = "normalise.views"
# Constants above this are not looked at; a mask of 4096 tokens still is.
_SMALL = 1 << 24


def simplify_views(program: Program) -> None:
    """Apply every simplification until none applies."""
    changed = True
    while changed:
        changed = False
        for node in list(program.calls()):
            rule = _RULES.get(row_of(node).name)
            new = rule(program, node) if rule is not None else None
            if new is not None and new is not node:
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)
                changed = True
    program.prune()


def _emit(program: Program, node: fx.Node, op: str, *args: Any) -> fx.Node:
    return program.emit(op, *args, before=node, made_by=_MADE_BY, like=node)


def _input(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _swapped(node: fx.Node) -> tuple[int, int] | None:
    """The two axes that the node swaps, or None."""
    rank = tensor_type(_input(node)).rank
    name = row_of(node).name
    if name in ("aten.t.default", "aten.numpy_T.default"):
        return (0, 1) if rank == 2 else None
    if name == "aten.transpose.int":
        a, b = (int(v) % rank for v in node.args[1:3])  # type: ignore[arg-type]
        return (min(a, b), max(a, b))
    order = [int(v) % rank for v in node.args[1]]  # type: ignore[union-attr, arg-type]
    moved = [i for i, v in enumerate(order) if i != v]
    return (moved[0], moved[1]) if len(moved) == 2 else None


def _transpose(program: Program, node: fx.Node) -> fx.Node | None:
    x, axes = _input(node), _swapped(node)
    if axes is None:
        return None
    if x.op == "call_function" and row_of(x).name == "aten.transpose.int" and _swapped(x) == axes:
        return _input(x)
    if row_of(node).name != "aten.transpose.int":
        return _emit(program, node, "aten.transpose.int", x, *axes)
    node.args = (x, *axes)
    return None


def _reshape(program: Program, node: fx.Node) -> fx.Node | None:
    x = _input(node)
    if same_shape(tensor_type(x).shape, tensor_type(node).shape):
        return x
    inner = x.op == "call_function" and row_of(x).name == "aten.reshape.default"
    # Flattening tokens only is what the lift of linears undoes; it needs the reshape before it.
    flattens = (
        tensor_type(node).rank == 2 and tensor_type(x).shape[-1] == tensor_type(node).shape[-1]
    )
    if inner and not flattens:
        node.args = (x.args[0], *node.args[1:])
    return None


def _expand(program: Program, node: fx.Node) -> fx.Node | None:
    x = _input(node)
    return x if same_shape(tensor_type(x).shape, tensor_type(node).shape) else None


def _cat(program: Program, node: fx.Node) -> fx.Node | None:
    parts: Any = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else 0
    rank = tensor_type(parts[0]).rank
    axis = int(axis) % rank  # type: ignore[arg-type]
    full = [p for p in parts if tensor_type(p).shape[axis] != 0]
    if len(full) == 1:
        return cast(fx.Node, full[0])
    node.args = (full, axis)
    return None


def _index(program: Program, node: fx.Node) -> fx.Node | None:
    """``x[..., [i, i+1, …]]`` with a constant list is a slice."""
    x, at = _input(node), node.args[1]
    assert isinstance(at, (list, tuple))
    given = [(axis, v) for axis, v in enumerate(at) if v is not None]
    if len(given) != 1:
        return None
    axis, value = given[0]
    known = constant_of(program, value)
    size = tensor_type(x).shape[axis]
    if known is None or known.dtype != torch.int64 or known.ndim != 1 or not isinstance(size, int):
        return None
    places = [int(v) + size if v < 0 else int(v) for v in known.tolist()]
    start = places[0] if places else -1
    if start < 0 or places != list(range(start, start + len(places))) or places[-1] >= size:
        return None
    return _emit(program, node, "aten.slice.Tensor", x, axis, start, start + len(places))


def constant_of(program: Program, node: object) -> torch.Tensor | None:
    """The small constant tensor that a node reads, where it lies in memory; never a checkpoint."""
    param = program.param_of(node)
    if param is None or param.trained:
        return None
    weights = program.weights
    if not isinstance(weights, LeafWeights) or torch.Size(param.shape).numel() > _SMALL:
        return None
    leaf = weights.leaves[param.name]
    return leaf.load() if leaf.in_memory else None


def _slice(program: Program, node: fx.Node) -> fx.Node | None:
    """Axes from the front and literal bounds within the axis; a whole axis is no slice."""
    x = _input(node)
    given = list(node.args[1:]) + [0, None, None, 1][len(node.args) - 1 :]
    t = tensor_type(x)
    axis, start, stop, step = given
    axis = int(axis) % t.rank  # type: ignore[arg-type]
    if same_shape(t.shape, tensor_type(node).shape):
        return x
    size = t.shape[axis]
    if step != 1 or not isinstance(size, int):
        return None
    low, high = 0 if start is None else start, size if stop is None else stop
    if isinstance(low, int) and isinstance(high, int):
        low, high = (max(0, v + size) if v < 0 else min(v, size) for v in (low, high))
        node.args = (x, axis, low, high)
        return _piece_of_cat(program, node)
    return None


def _slice_scatter(program: Program, node: fx.Node) -> fx.Node | None:
    """A part put into a tensor: what lies before it, the part, and what lies behind."""
    given = list(node.args[2:]) + [0, None, None, 1][len(node.args) - 2 :]
    x, part = _input(node), node.args[1]
    axis, start, stop, step = given
    axis = int(axis) % tensor_type(x).rank  # type: ignore[arg-type]
    size = tensor_type(x).shape[axis]
    low, high = 0 if start is None else start, size if stop is None else stop
    if step != 1 or not all(isinstance(v, int) for v in (size, low, high)):
        return None
    low, high = (max(0, v + size) if v < 0 else min(v, size) for v in (low, high))  # type: ignore[operator, type-var]
    sides = ((0, low), (high, size))
    head, tail = (
        [_emit(program, node, "aten.slice.Tensor", x, axis, a, b)] if a < b else []  # type: ignore[operator]
        for a, b in sides
    )
    return _emit(program, node, "aten.cat.default", [*head, part, *tail], axis)


def _piece_of_cat(program: Program, node: fx.Node) -> fx.Node | None:
    """Whole parts of a concatenation, taken out again."""
    x, axis, low, high = _input(node), node.args[1], node.args[2], node.args[3]
    if x.op != "call_function" or row_of(x).name != "aten.cat.default":
        return None
    parts: Any = x.args[0]
    if len(node.args) > 4 or (x.args[1] if len(x.args) > 1 else 0) != axis:
        return None
    sizes = [tensor_type(p).shape[axis] for p in parts]  # type: ignore[index]
    if not all(isinstance(v, int) for v in (*sizes, low, high)):
        return None
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    if low not in edges or high not in edges:
        return None
    found = parts[edges.index(low) : edges.index(high)]
    if len(found) == 1:
        return cast(fx.Node, found[0])
    return _emit(program, node, "aten.cat.default", found, axis) if found else None


_RULES = {
    "aten.t.default": _transpose,
    "aten.numpy_T.default": _transpose,
    "aten.transpose.int": _transpose,
    "aten.permute.default": _transpose,
    "aten.reshape.default": _reshape,
    "aten.cat.default": _cat,
    "aten.expand.default": _expand,
    "aten.index.Tensor": _index,
    "aten.slice.Tensor": _slice,
    "aten.slice_scatter.default": _slice_scatter,
}
