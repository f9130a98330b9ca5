"""Which row of a matrix each element of a value is: labels carried through the ops that move them.

The ops are run themselves on a tensor of row numbers at batch and sequence 1, so any layout that
they make (fused, interleaved, repeated) is followed exactly. Beside moves only what keeps each
channel apart passes: rotation by position, a norm, a factor that all channels share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.dims import Dim
from ..ir.graph import info
from ..ir.types import SymType
from .flow import LINEAR, MOVES, VIEWS, is_cut
from .ties import as_int, is_element, op_name, shape_of

Labels = Tensor | tuple[Tensor, ...]

_RETYPED = MOVES - VIEWS | {
    "aten.alias.default", "aten.detach.default", "aten.dropout.default",
}  # fmt: skip
_LAID = frozenset({
    "aten.select.int", "aten.expand.default", "aten.repeat_interleave.self_int",
    "aten.unbind.int", "aten.cat.default", "aten.stack.default",
})  # fmt: skip
_NORMS = ("llmc.rms_norm", "llmc.layer_norm")
_FACTORS = frozenset({
    "aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar",
})  # fmt: skip


class Untraced(Exception):
    """Why labels could not be followed: (predicate, reason, culprit)."""

    def __init__(self, predicate: str, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.predicate, self.reason, self.node = predicate, reason, node


@dataclass
class Trace:
    """Labels of everything between one linear's result and a value.

    Attributes:
        source: the linear; its result's elements are labelled 0 … out-1.
        labels: int64 by value, batch and sequence being 1.
        pairs: (first, second) labels that each rotation turns together, with the call.
        norms: (call, labels of what it normalises).
    """

    value: fx.Node
    source: fx.Node
    labels: dict[fx.Node, Labels]
    pairs: list[tuple[fx.Node, Tensor, Tensor]] = field(default_factory=list)
    norms: list[tuple[fx.Node, Tensor]] = field(default_factory=list)

    @property
    def end(self) -> Tensor:
        """Labels [heads, D] of the value [B, heads, S, D] itself, the same for every token.

        Raises:
            Untraced: tokens of a fixed number that hold different channels.
        """
        found = self.labels[self.value]
        assert isinstance(found, Tensor)
        if not torch.equal(found, found[:1, :, :1].expand_as(found)):
            raise Untraced("tokens_alike", f"{self.value.name} mixes tokens", self.value)
        return found[0, :, 0]


def trace(value: fx.Node) -> Trace:
    """Follow a value back to the one linear that makes all of it.

    Raises:
        Untraced: something on the way mixes channels, or several linears make it.
    """
    out = Trace(value, value, {})
    factors: list[tuple[fx.Node, Tensor]] = []
    for node in _upstream(value):
        name = op_name(node)
        if name == LINEAR:
            if out.labels:
                raise Untraced("one_linear", f"{node.name} makes another part of it", node)
            n = as_int((shape_of(node) or ())[-1])
            if n is None:
                raise Untraced("channels_known", f"{node.name} has a symbolic width", node)
            out.source = node
            out.labels[node] = torch.arange(n).expand(_concrete(node))
            continue
        found = carried(node, out.labels)
        if found is None:
            raise Untraced("channels_kept", f"{node.name} ({name or node.op}) mixes them", node)
        out.labels[node] = found
        if isinstance(found, Tensor):
            if name == "llmc.rope":
                first, second = found.reshape(-1, found.shape[-1]).tensor_split(2, -1)
                if node.kwargs.get("interleaved"):
                    first, second = found.flatten()[::2], found.flatten()[1::2]
                out.pairs.append((node, first.flatten(), second.flatten()))
            elif name in _NORMS:
                out.norms.append((node, found))
            elif name in _FACTORS:
                factors.append((node, found))
    for node, found in factors:
        if not torch.isin(out.end, found).all():
            raise Untraced("channels_kept", f"{node.name} scales a part of them", node)
    return out


def _upstream(value: fx.Node) -> list[fx.Node]:
    """What a value is made of, up to linears, in graph order."""
    seen: set[fx.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if node not in seen and node.op == "call_function":
            seen.add(node)
            todo += [] if op_name(node) == LINEAR else _operands(node)
        elif node.op != "call_function":
            raise Untraced("made_by_linear", f"{node.name} is made by no linear", node)
    return [n for n in value.graph.nodes if n in seen]


def _operands(node: fx.Node) -> list[fx.Node]:
    """The values whose elements a call lays out anew: its first argument, or the list in it."""
    first = node.args[0] if node.args else None
    listed: Iterable[Any] = first if isinstance(first, (list, tuple)) else (first,)
    out = [v for v in listed if isinstance(v, fx.Node)]
    if not out:
        raise Untraced("made_by_linear", f"{node.name} is made by no linear", node)
    return out


def carried(node: fx.Node, labels: dict[fx.Node, Labels]) -> Labels | None:
    """Labels of a call's result from those of its operands; None where it does not keep them."""
    name = op_name(node)
    if any(v not in labels for v in _operands(node)):
        return None
    x = labels[_operands(node)[0]]
    if name in _RETYPED or name == "llmc.rope" or name in _NORMS:
        return x
    if name in _FACTORS:
        return x if isinstance(node.args[1], (int, float)) else None
    if name in VIEWS or name in _LAID or is_cut(node) or is_element(node):
        args = fx.map_arg(node.args, lambda n: labels[n] if n in labels else _size(n))
        if any(a is None for a in args) or node.kwargs:
            return None
        moved: Labels = node.target(*args)  # type: ignore[operator]
        if isinstance(moved, (list, tuple)):
            return tuple(part.contiguous() for part in moved)
        return moved.contiguous()
    return None


def _size(node: fx.Node) -> int | None:
    kind = info(node).type
    return _one(kind.expr) if isinstance(kind, SymType) else None


def _one(d: Dim) -> int:
    """The length at batch and sequence 1."""
    return d if isinstance(d, int) else int(d.subs(dict.fromkeys(d.free_symbols, 1)))


def _concrete(node: fx.Node) -> list[int]:
    return [_one(d) for d in shape_of(node) or ()]


def reads(value: fx.Node) -> tuple[fx.Node, Tensor]:
    """(the one linear that reads a value through moves, labels [in] of its input's channels).

    Args:
        value: [B, S, heads, D]; each token's elements are labelled 0 … heads·D-1.
    Raises:
        Untraced: anything else reads it.
    """
    shape = _concrete(value)
    first = torch.arange(shape[-2] * shape[-1]).reshape(shape[-2:])
    labels: dict[fx.Node, Labels] = {value: first.expand(shape)}
    found: list[tuple[fx.Node, fx.Node]] = []
    todo = [value]
    while todo:
        at = todo.pop()
        for user in at.users:
            if op_name(user) == LINEAR and user.args[0] is at and user.args.count(at) == 1:
                found.append((user, at))
                continue
            moved = carried(user, labels) if user.args and user.args[0] is at else None
            if moved is None or op_name(user) in (*_NORMS, *_FACTORS, "llmc.rope"):
                name = op_name(user) or user.op
                raise Untraced("one_reader", f"{user.name} ({name}) reads it", user)
            labels[user] = moved
            todo.append(user)
    if len(found) != 1:
        raise Untraced("one_reader", f"{len(found)} linears read it", value)
    last = labels[found[0][1]]
    assert isinstance(last, Tensor)
    rows = last.reshape(-1, last.shape[-1])
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        raise Untraced("tokens_alike", f"{found[0][1].name} mixes tokens", found[0][1])
    return found[0][0], rows[0]


def run_of(found: Trace, index: Tensor) -> fx.Node:
    """The first value on the way that holds the heads ``index`` [heads, D] in order, and no more.

    Raises:
        Untraced: there is none.
    """
    flat = index.flatten()
    for node, labels in found.labels.items():
        whole = isinstance(labels, Tensor) and torch.equal(labels.flatten(), flat)
        if whole and node is not found.source:
            return node
    raise Untraced("layout_known", f"{found.value.name} is no run of whole heads", found.value)


def leaks(parts: Iterable[Trace], reader: fx.Node, rows: Tensor) -> fx.Node | None:
    """Who else reads elements with these labels of one linear, besides ``reader``; None: nobody.

    ``parts`` are traces of that linear which end at ``reader``.
    """
    known: dict[fx.Node, Labels] = {n: v for t in parts for n, v in t.labels.items()}
    for node, labels in known.items():
        mine = labels if isinstance(labels, tuple) else (labels,)
        if not any(torch.isin(part, rows).any() for part in mine):
            continue
        for user in node.users:
            if user in known or user is reader or isinstance(info(user).type, SymType):
                continue
            moved = carried(user, known)
            if not isinstance(moved, Tensor) or torch.isin(moved, rows).any():
                return user
    return None


def told_once(value: object, interleaved: bool) -> bool:
    """Whether both channels of each rotary pair are proved to read one angle's cos or sin.

    The table [..., D] is laid out from one of D/2 angles: twice in a row, or each one twice.
    """
    while isinstance(value, fx.Node) and value.op == "call_function":
        name, args = op_name(value), value.args
        last = (-1, len(shape_of(value) or ()) - 1)
        if name == "aten.cat.default":
            parts = args[0]
            assert isinstance(parts, (list, tuple))
            along = (args[1] if len(args) > 1 else 0) in last
            return not interleaved and along and len(parts) == 2 and parts[0] is parts[1]
        if name == "aten.repeat_interleave.self_int":
            return bool(interleaved and args[1] == 2 and len(args) > 2 and args[2] in last)
        alike = name in _RETYPED or name in ("aten.cos.default", "aten.sin.default")
        factor = name in _FACTORS and isinstance(args[1], (int, float))
        ahead = name == "aten.unsqueeze.default" and args[1] not in last
        if not (alike or factor or ahead):
            return False
        value = args[0]
    return False
