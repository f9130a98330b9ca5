"""Canonical labels of graph pieces: equal labels mean equal structure, whatever the names."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from typing import Any

import sympy
from torch import fx

from ..ir.graph import info
from ..ir.ops.base import row_of
from ..ir.types import show_type
from .ties import op_name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _reading_order(starts: Iterable[fx.Node], inside: Collection[fx.Node]) -> list[fx.Node]:
    """Nodes after what they read, in the order in which arguments are met from ``starts``."""
    done: dict[fx.Node, None] = {}
    for start in starts:
        todo = [(start, False)]
        while todo:
            node, ready = todo.pop()
            if node in done or node not in inside:
                continue
            if ready:
                done[node] = None
            else:
                todo.append((node, True))
                todo += [(i, False) for i in reversed(node.all_input_nodes)]
    return list(done)


def chunk_label(
    nodes: Iterable[fx.Node],
    start: fx.Node | None,
    *,
    attributes: bool = False,
    weights: Collection[fx.Node] = (),
) -> str:
    """Label of a set of nodes by ops and data flow; names and parameter identities do not enter.

    Args:
        nodes: the piece, in any topological order: the label does not depend on it, as long as one
            value leaves the piece.
        start: the value that flows in, told apart from other outside values; None: outside values
            are told apart by the order in which they are first read.
        attributes: types, shapes and non-tensor arguments enter too. Without them parameters and
            whatever is computed from parameters alone are one leaf, so a compressed linear looks
            like a dense one.
        weights: values outside that count as parameters.
    """
    piece = [n for n in nodes if n.op in ("call_function", "get_attr")]
    inside, label, outside = set(piece), dict[fx.Node, str](), dict[fx.Node, str]()
    constant: set[fx.Node] = set()

    def leaf(n: fx.Node) -> str:
        if n is start:
            return "stream"
        kind = f"in{len(outside)}" if attributes else "in"
        if n.op == "get_attr" or n in weights:
            kind = "param"
        return outside.setdefault(n, f"{kind}:{show_type(info(n).type)}" if attributes else kind)

    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return label[value] if value in inside else leaf(value)
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(show(v) for v in value) + "]"
        if isinstance(value, sympy.Expr):
            return str(value) if attributes else "_"
        return repr(value) if attributes else "_"

    leaves = [n for n in piece if any(u not in inside for u in n.users)]
    for n in _reading_order([*leaves, *reversed(piece)], inside):
        made_of = n.all_input_nodes
        if n.op == "get_attr" or (made_of and all(i in constant for i in made_of)):
            constant.add(n)
            if not attributes or n.op == "get_attr":
                label[n] = f"param:{show_type(info(n).type)}" if attributes else "param"
                continue
        # A state's name says which cache, not what is done with it.
        skip = {"state"} if n.op == "call_function" and row_of(n).stateful else set()
        named = [
            k
            for k, v in sorted(n.kwargs.items())
            if k not in skip and (attributes or isinstance(v, fx.Node))
        ]
        keys = ",".join(f"{k}={show(n.kwargs[k])}" for k in named)
        args = ",".join(show(a) for a in n.args)
        kind = show_type(info(n).type) if attributes else ""
        label[n] = _digest(f"{op_name(n)}({args};{keys}){kind}")
    leaving = sorted(label[n] for n in leaves)
    weight = sum(n not in constant for n in piece)
    return _digest(f"{weight}|" + "|".join(leaving))
