"""Rebuilding a graph from a text: exact node names, no duplicates, types of results."""

from __future__ import annotations

from typing import Any

from torch import fx

from .errors import ModelError
from .graph import Program, info
from .names import is_name, set_name
from .types import ValueType


class Builder:
    """Adds nodes with exactly the given names."""

    def __init__(self, program: Program) -> None:
        self.graph = program.graph
        self.names: set[str] = set()

    def add(
        self, op: str, target: Any, name: str, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> fx.Node:
        """A new last node.

        Raises:
            ModelError: a name that is taken or not an identifier.
        """
        if not is_name(name) or name in self.names:
            kind = "twice" if name in self.names else "which is not one"
            raise ModelError(f"expected a new identifier, found {name[:60]!r} {kind}")
        self.names.add(name)
        node = self.graph.create_node(op, target, args, kwargs or {}, name=name)
        set_name(node, name)
        return node


def result_type(value: Any) -> ValueType:
    """Type of what the program returns: a value, or a tuple, list or dict of values.

    Raises:
        ModelError: a returned literal.
    """
    if isinstance(value, fx.Node):
        return info(value).type
    if isinstance(value, (list, tuple)):
        return tuple(result_type(v) for v in value)
    if isinstance(value, dict):
        return tuple(result_type(v) for v in value.values())
    raise ModelError(f"expected values in the result, found {value!r}")
