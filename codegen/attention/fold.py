"""Rotations of queries and keys become part of the cached attention that reads them.

Queries and keys are rotated on their way, keys into the cache: one launch instead of four.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...compiler.ir.graph import Program, info, tensor_type
from ...compiler.ir.ops import row_of
from ...compiler.ir.refusal import Refusal
from .problem import COS

MAKER = "lower"


@dataclass(frozen=True)
class _Turned:
    """A rotation, or one of the first channels with the others joined behind."""

    source: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    made: tuple[fx.Node, ...]


def fold_rotations(program: Program) -> list[Refusal]:
    """Fold rotations into the cached attentions of `program`, in place; what was left, and why.

    An attention stays as it is where queries and keys are not rotated alike, or where something
    else reads one of them.
    """
    refused: list[Refusal] = []
    if next(program.calls("llmc.rope"), None) is None:
        return refused
    for node in list(program.calls("llmc.cached_attention")):
        if len(node.args) > COS and any(a is not None for a in node.args[COS:]):
            continue
        found = [_turned(a) for a in node.args[:2]]
        why = next((f for f in found if isinstance(f, str)), None)
        if why is None:
            why = _fold(program, node, *(f for f in found if isinstance(f, _Turned)))
        if why is not None:
            refused.append(Refusal(MAKER, node.name, why, "rotation", info(node).path))
    program.prune()
    return refused


def _fold(program: Program, node: fx.Node, q: _Turned, k: _Turned) -> str | None:
    if (q.cos, q.sin, q.interleaved) != (k.cos, k.sin, k.interleaved):
        return "queries and keys are rotated by different angles"
    for name, turned in (("queries", q), ("keys", k)):
        if any(len(n.users) > 1 for n in turned.made):
            return f"something beside attention reads rotated {name}"
    kind = tensor_type(q.cos)
    if kind.rank != 4 or kind.shape[1] != 1:
        return f"expected cosines [B, 1, S, R], found {kind}"
    rest = [*node.args[2:], *[None] * COS][: COS - 2]
    node.args = (q.source, k.source, *rest, q.cos, q.sin)
    node.kwargs = {**node.kwargs, "interleaved": q.interleaved, "rotate": True}
    return None


def _turned(value: object) -> _Turned | str:
    """The rotation that makes a value, or what makes it instead."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return "it reads what nothing rotates"
    name = row_of(value).name
    if name == "llmc.rope":
        return _of_rope(value, value.args[0], (value,))
    if name != "aten.cat.default":
        return f"{name} makes what it reads, no rotation"
    parts, axis = value.args[0], value.args[1] if len(value.args) > 1 else 0
    if axis not in (3, -1) or not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return "it reads values that are joined in another way than rotated ones to the others"
    turned, others = _call(parts[0], "llmc.rope"), _call(parts[1], "aten.slice.Tensor")
    if turned is None or others is None:
        return "it reads joined values of which none is rotated"
    first, width = _call(turned.args[0], "aten.slice.Tensor"), tensor_type(turned).shape[3]
    source = others.args[0]
    if first is None or first.args[0] is not source or not isinstance(source, fx.Node):
        return "rotated channels and the others are of different values"
    ends = (0, width), (width, tensor_type(source).shape[3])
    if not all(_cut(s, *e) for s, e in zip((first, others), ends, strict=True)):
        return "rotated channels are not the first ones, or some are missing"
    return _of_rope(turned, source, (value, turned))


def _of_rope(rope: fx.Node, source: object, made: tuple[fx.Node, ...]) -> _Turned:
    cos, sin = rope.args[1:3]
    assert isinstance(source, fx.Node)
    assert isinstance(cos, fx.Node)
    assert isinstance(sin, fx.Node)
    return _Turned(source, cos, sin, bool(rope.kwargs.get("interleaved", False)), made)


def _call(value: object, name: str) -> fx.Node | None:
    """The value, where it is a call of that op."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return None
    return value if row_of(value).name == name else None


def _cut(node: fx.Node, start: object, stop: object) -> bool:
    """Whether a slice takes channels ``start`` … ``stop`` - 1 of the last axis."""
    _, axis, begin, end, *step = node.args
    whole = end == stop or (isinstance(end, int) and isinstance(stop, int) and end >= stop)
    last = tensor_type(node).rank - 1
    return axis in (last, -1) and begin == start and whole and step in ([], [1])
