"""What is done to queries and keys becomes part of the cached attention that reads them.

They are normed and rotated on their way, keys into the cache: one launch instead of six. A norm
comes before the rotation or, where it is of each head, behind it. A number that multiplies queries
goes into the attention's own scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ...compiler.ir.dims import same, same_shape
from ...compiler.ir.graph import Program, info, tensor_type
from ...compiler.ir.ops import row_of
from ...compiler.ir.refusal import Refusal
from ..fuse_nodes import argument
from .fold_last import fold_last
from .parts import MAKER, call, cut, give
from .problem import COS, GAIN, Q_SCALE, SLOPES

_VIEWS = frozenset({
    "aten.transpose.int", "aten.permute.default", "aten.reshape.default", "aten.view.default",
    "aten.unflatten.int",
})  # fmt: skip
# What makes queries and keys of something else: no rotation behind it is theirs.
_ENDS = frozenset({"aten.linear.default", "llmc.fused", "aten.embedding.default"})
_SIDES = ("queries", "keys")


@dataclass(frozen=True)
class _Turned:
    """A rotation, or one of the first channels with the others joined behind.

    ``flipped``: of values [B, S, H, R], whose axes are exchanged behind it.
    """

    source: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    made: tuple[fx.Node, ...]
    flipped: bool = False


@dataclass(frozen=True)
class _Normed:
    """A norm of each head, or of all of a token's; ``how``: its kind, eps and offset."""

    call: fx.Node
    gain: fx.Node | None
    how: tuple[str, float, float]


def fold_inputs(program: Program) -> list[Refusal]:
    """Fold norms, rotations and scales into the cached attentions of `program`, in place.

    What was left, and why: an attention stays as it is where queries and keys are not treated
    alike, or where something else reads one of them.
    """
    why: dict[tuple[str, str], Refusal] = {}
    # From attention backwards; a scale is looked for on both sides of a rotation.
    folds: tuple[tuple[str, Callable[[Program, fx.Node], str | None]], ...] = (
        ("scale", _fold_scale), ("each", _fold_each), ("behind", _fold_behind), ("last", fold_last),
        ("rotation", _fold_rotation), ("scale", _fold_scale), ("norm", _fold_norm),
    )  # fmt: skip
    attending = [
        node for node in program.calls("llmc.cached_attention")
        if all(a is None for a in node.args[COS:SLOPES])
    ]  # fmt: skip
    for predicate, fold in folds:
        for node in attending:
            reason = fold(program, node)
            if reason is not None:
                found = Refusal(MAKER, node.name, reason, predicate, info(node).path)
                why[node.name, predicate] = found
        program.prune()
    return list(why.values())


# ** scales of queries **


def _fold_scale(program: Program, node: fx.Node) -> str | None:
    maker, views = _behind(node.args[0])
    factor = None if maker is None else _factor(maker)
    if maker is None or factor is None:
        return None
    if any(len(n.users) > 1 for n in (maker, *views)):
        return "something beside attention reads scaled queries"
    if node.kwargs.get("norm"):
        return "queries are scaled before their norm, not behind it"
    _drop(program, maker)
    node.kwargs = {**node.kwargs, "scale": float(str(node.kwargs["scale"])) * factor}
    return None


def _fold_each(program: Program, node: fx.Node) -> str | None:
    """Fold a product of queries and numbers [B, 1, S, 1], one for each query."""
    product = call(node.args[0], "aten.mul.Tensor")
    if product is None or not all(isinstance(a, fx.Node) for a in product.args):
        return None
    q = tensor_type(product).shape
    for x, by in (product.args, product.args[::-1]):
        assert isinstance(x, fx.Node)
        assert isinstance(by, fx.Node)
        kind = tensor_type(by)
        if kind.rank != 4 or not same_shape(kind.shape[1:], (1, q[2], 1)):
            continue
        if not same_shape(tensor_type(x).shape, q):
            continue
        if len(product.users) > 1:
            return "something beside attention reads scaled queries"
        give(node, {0: x, Q_SCALE: by})
        return None
    return None


def _factor(node: fx.Node) -> float | None:
    """The number that a call multiplies by; None where it does something else."""
    name, by = row_of(node).name, node.args[1] if len(node.args) > 1 else None
    if name not in ("aten.mul.Tensor", "aten.div.Tensor") or isinstance(by, (bool, fx.Node)):
        return None
    if not isinstance(by, (int, float)) or not by or not math.isfinite(by):
        return None
    return float(by) if name == "aten.mul.Tensor" else 1.0 / by


# ** rotations **


def _fold_rotation(program: Program, node: fx.Node) -> str | None:
    if node.kwargs.get("rotate"):
        return None
    found = [_turned(a) for a in node.args[:2]]
    why = next((f for f in found if isinstance(f, str)), None)
    q, k = found
    if why is not None or isinstance(q, str) or isinstance(k, str):
        return why
    if q is None or k is None:
        return _one_sided("rotated", found)
    if (q.cos, q.sin, q.interleaved, q.flipped) != (k.cos, k.sin, k.interleaved, k.flipped):
        return "queries and keys are rotated by different angles"
    for name, turned in zip(_SIDES, (q, k), strict=True):
        if any(len(n.users) > 1 for n in turned.made):
            return f"something beside attention reads rotated {name}"
    kind, heads = tensor_type(q.cos), 2 if q.flipped else 1
    if kind.rank != 4 or kind.shape[heads] != 1:
        return f"expected cosines {'[B, S, 1, R]' if q.flipped else '[B, 1, S, R]'}, found {kind}"
    read = [q.source, k.source, q.cos, q.sin]
    if q.flipped:
        read = [
            program.emit("aten.transpose.int", n, 1, 2, before=node, made_by=MAKER, like=node)
            for n in read
        ]
    give(node, {0: read[0], 1: read[1], COS: read[2], COS + 1: read[3]})
    norm = {"norm": "behind"} if node.kwargs.get("norm") else {}
    node.kwargs = {**node.kwargs, "interleaved": q.interleaved, "rotate": True, **norm}
    return None


def _turned(value: object) -> _Turned | str | None:
    """The rotation that makes a value, why it cannot be part of attention; None for no rotation."""
    if not isinstance(value, fx.Node) or not _rotates(value):
        return None
    if _flips(value):
        inner = _rotation(value.args[0])
        if isinstance(inner, str):
            return inner
        return replace(inner, made=(value, *inner.made), flipped=True)
    return _rotation(value)


def _rotation(value: object) -> _Turned | str:
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
    turned, others = call(parts[0], "llmc.rope"), call(parts[1], "aten.slice.Tensor")
    if turned is None or others is None:
        return "it reads joined values of which none is rotated"
    first, width = call(turned.args[0], "aten.slice.Tensor"), tensor_type(turned).shape[3]
    source = others.args[0]
    if first is None or first.args[0] is not source or not isinstance(source, fx.Node):
        return "rotated channels and the others are of different values"
    ends = (0, width), (width, tensor_type(source).shape[3])
    if not all(cut(s, *e) for s, e in zip((first, others), ends, strict=True)):
        return "rotated channels are not the first ones, or some are missing"
    return _of_rope(turned, source, (value, turned))


def _of_rope(rope: fx.Node, source: object, made: tuple[fx.Node, ...]) -> _Turned:
    cos, sin = rope.args[1:3]
    assert isinstance(source, fx.Node)
    assert isinstance(cos, fx.Node)
    assert isinstance(sin, fx.Node)
    return _Turned(source, cos, sin, bool(rope.kwargs.get("interleaved", False)), made)


def _rotates(value: fx.Node) -> bool:
    """Whether a rotation stands between a value and the linear that makes it."""
    todo, seen = [value], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function" or row_of(node).name in _ENDS:
            continue
        if row_of(node).name == "llmc.rope":
            return True
        seen.add(node)
        todo += node.all_input_nodes
    return False


# ** norms **


def _fold_behind(program: Program, node: fx.Node) -> str | None:
    """Fold norms of heads that are rotated already; what stands in the way is told later."""
    found = [_normed(a, name) for a, name in zip(node.args[:2], _SIDES, strict=True)]
    if all(isinstance(f, _Normed) and f.how[0] == "head" and _rotates(f.call) for f in found):
        _fold_norm(program, node)
    return None


def _fold_norm(program: Program, node: fx.Node) -> str | None:
    if node.kwargs.get("last"):
        return None
    found = [_normed(a, name) for a, name in zip(node.args[:2], _SIDES, strict=True)]
    why = next((f for f in found if isinstance(f, str)), None)
    q, k = found
    if why is not None or isinstance(q, str) or isinstance(k, str):
        return why
    if q is None or k is None:
        return _one_sided("normed", found)
    if node.kwargs.get("norm"):
        return "queries and keys are normed before their rotation and behind it"
    if q.how != k.how:
        return f"expected one kind, eps and offset of norms, found {q.how} and {k.how}"
    if (q.gain is None) != (k.gain is None):
        return "expected a norm with gains of queries and of keys, or of neither"
    give(node, {GAIN: q.gain, GAIN + 1: k.gain})
    kind, eps, offset = q.how
    node.kwargs = {**node.kwargs, "norm": kind, "eps": eps, "offset": offset}
    for normed in (q, k):
        _drop(program, normed.call)
    return None


def _normed(value: object, name: str) -> _Normed | str | None:
    """The norm that makes a value, why it cannot be part of attention; None for no norm."""
    call, views = _behind(value)
    op = "" if call is None else row_of(call).name
    if call is None or not op.endswith("_norm"):
        return None
    if op != "llmc.rms_norm":
        return f"{op} makes {name}, expected llmc.rms_norm"
    if any(len(n.users) > 1 for n in (call, *views)):
        return f"something beside attention reads normed {name}"
    kind, width = _kind(call, views), tensor_type(call).shape[-1]
    if kind is None:
        return f"{name} are normed over something else than each head or all heads of a token"
    given = call.kwargs
    if given.get("count") not in (None, width):
        return f"expected the mean square of {width} channels of {name}, found {given['count']}"
    gain = argument(call, 1, "gain")
    return _Normed(call, gain, (kind, float(str(given["eps"])), float(str(given.get("offset", 0)))))


def _kind(call: fx.Node, views: list[fx.Node]) -> str | None:
    """What a norm goes over, whose result becomes [B, heads, S, D] by views, last one first."""
    kind = tensor_type(call)
    if kind.rank == 4 and all(_flips(v) for v in views):
        return "head"
    if kind.rank != 3 or len(views) != 2 or not _flips(views[0]):
        return None
    split = tensor_type(views[1])
    tokens = split.rank == 4 and all(map(same, split.shape[:2], kind.shape[:2]))
    return "row" if tokens else None


# ** both **


def _behind(value: object) -> tuple[fx.Node | None, list[fx.Node]]:
    """The call that makes a value, and the views in between, the last one first."""
    views: list[fx.Node] = []
    while isinstance(value, fx.Node) and value.op == "call_function":
        if row_of(value).name not in _VIEWS:
            return value, views
        views.append(value)
        value = value.args[0]
    return None, views


def _one_sided(what: str, found: list[Any]) -> str | None:
    """Why one of queries and keys alone is left as it is; None where it is neither."""
    does = [name for name, f in zip(_SIDES, found, strict=True) if f is not None]
    return f"{does[0]} are {what} and {_SIDES[does == ['queries']]} are not" if does else None


def _flips(node: fx.Node) -> bool:
    """Whether a call exchanges heads and tokens."""
    if call(node, "aten.transpose.int") is None or tensor_type(node).rank != 4:
        return False
    return {int(str(a)) % 4 for a in node.args[1:3]} == {1, 2}


def _drop(program: Program, call: fx.Node) -> None:
    """Take a call away whose first argument its readers read instead."""
    source = call.args[0]
    assert isinstance(source, fx.Node)
    call.replace_all_uses_with(source)
    program.graph.erase_node(call)
