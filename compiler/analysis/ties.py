"""Reading a graph through the ties of its op rows: which axis of which value becomes which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
from torch import fx

from ..ir.dims import BATCH, SEQ, Dim
from ..ir.graph import info
from ..ir.ops.base import Tie, row_for, types_of
from ..ir.types import TensorType

ATTENTION = frozenset({"llmc.attention", "llmc.cached_attention"})
"""The rows that mix along the sequence by design."""

WHOLE_ATTENTION = ATTENTION | {"aten.scaled_dot_product_attention.default"}
"""Attention in one node, lifted or not: q, k, v are its first arguments."""


class Axis(NamedTuple):
    """One axis of one value, of its element ``part`` where the value is a tuple."""

    node: fx.Node
    axis: int
    part: int = 0


@dataclass(frozen=True)
class BoundTie:
    """A tie of a row, bound to the values of one call.

    ``ins`` are axes of operands, ``outs`` axes of the call's own result.
    """

    node: fx.Node
    kind: str
    ins: tuple[Axis, ...]
    outs: tuple[Axis, ...]
    factor: Dim
    offset: int


def op_name(node: object) -> str:
    """Name of the op row of a call, ``""`` for anything else."""
    if isinstance(node, fx.Node) and node.op == "call_function":
        row = row_for(node.target)
        return row.name if row is not None else str(node.target)
    return ""


def is_element(node: object) -> bool:
    """Whether a call takes one element of a tuple value."""
    return op_name(node) == "operator.getitem"


def operands(node: fx.Node) -> list[tuple[fx.Node, int] | Any]:
    """Positional arguments laid out flat, as tie indices count them: values as (node, element)."""
    flat: list[Any] = []

    def add(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for v in value:
                add(v)
        elif isinstance(value, fx.Node):
            t = info(value).type
            flat.extend((value, i) for i in range(len(t) if isinstance(t, tuple) else 1))
        else:
            flat.append(value)

    for argument in node.args:
        add(argument)
    return flat


def shape_of(node: object, part: int = 0) -> tuple[Dim, ...] | None:
    """Shape of a tensor value, or of an element of a tuple value, else None."""
    if isinstance(node, fx.Node) and "llmc" in node.meta:
        t = info(node).type
        if isinstance(t, tuple) and part < len(t):
            t = t[part]
        if isinstance(t, TensorType):
            return t.shape
    return None


def parts_of(node: fx.Node) -> int:
    """How many tensors a value holds."""
    t = info(node).type
    return len(t) if isinstance(t, tuple) else 1


def raw_ties(node: fx.Node) -> list[Tie] | None:
    """The row's ties for this call; None where the row has no rule, which blocks every axis."""
    row = row_for(node.target)
    if row is None or row.ties is None:
        return None
    args, kwargs = types_of(node)
    found = row.ties(info(node).type, *args, **kwargs)
    return None if found is None else list(found)


def ties_of(node: fx.Node) -> list[BoundTie] | None:
    """The call's ties bound to its operands; None where the op has no rule."""
    found = raw_ties(node)
    if found is None:
        return None
    flat = operands(node)
    out = []
    for tie in found:
        ins = []
        for i, axis in tie.ins:
            value, part = flat[i] if i < len(flat) and isinstance(flat[i], tuple) else (None, 0)
            shape = shape_of(value, part)
            if value is not None and shape is not None:
                ins.append(Axis(value, axis % len(shape), part))
        outs = tuple(Axis(node, a, tie.result) for a in tie.outs)
        out.append(BoundTie(node, tie.kind, tuple(ins), outs, tie.factor, tie.offset))
    return out


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """Call nodes in order."""
    return (n for n in graph.nodes if n.op == "call_function")


def symbols(d: Dim) -> set[str]:
    """Names of the input symbols in a dim."""
    return set() if isinstance(d, int) else {str(s) for s in d.free_symbols}


def is_sequence(d: Dim) -> bool:
    """Whether an axis of that length runs along the sequence."""
    return not isinstance(d, int) and SEQ in d.free_symbols


def is_batch(d: Dim) -> bool:
    """Whether an axis of that length runs along the batch and nothing else."""
    return not isinstance(d, int) and d.free_symbols == {BATCH}


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Values that depend on no input: parameters and what is computed from them alone."""
    out: set[fx.Node] = set()
    for n in graph.nodes:
        if n.op == "get_attr" or (
            n.op == "call_function" and all(i in out for i in n.all_input_nodes)
        ):
            out.add(n)
    return out


def as_int(d: object) -> int | None:
    """The number behind a dim, None where it is symbolic."""
    if isinstance(d, int):
        return d
    return int(d) if isinstance(d, sympy.Integer) else None
