"""What folds read and write of a graph: calls, slices, arguments."""

from __future__ import annotations

from torch import fx

from ...compiler.ir.graph import tensor_type
from ...compiler.ir.ops import row_of

MAKER = "lower"


def call(value: object, name: str) -> fx.Node | None:
    """The value, where it is a call of that op."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return None
    return value if row_of(value).name == name else None


def cut(node: fx.Node, start: object, stop: object) -> bool:
    """Whether a slice takes channels ``start`` … ``stop`` - 1 of the last axis."""
    _, axis, begin, end, *step = node.args
    whole = end == stop or (isinstance(end, int) and isinstance(stop, int) and end >= stop)
    last = tensor_type(node).rank - 1
    return axis in (last, -1) and begin == start and whole and step in ([], [1])


def give(node: fx.Node, given: dict[int, fx.Node | None]) -> None:
    """Let a call read these as its arguments at these places."""
    args = [*node.args, *[None] * (max(given) + 1 - len(node.args))]
    for at, value in given.items():
        args[at] = value
    node.args = tuple(args)
