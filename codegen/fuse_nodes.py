"""Small questions that the fusion planner asks of a graph, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..compiler.ir.graph import info
from ..compiler.ir.ops import row_of
from ..compiler.ir.refusal import Refusal
from .problem import Problem

MAKER = "fuse"
LINEAR, ADD = "aten.linear.default", "aten.add.Tensor"

Accept = Callable[[Problem], str | None]
"""Why a target has no kernel for a problem; None when it has one."""


def refusal(node: fx.Node, reason: str, predicate: str) -> Refusal:
    """A refusal of the planner at a node."""
    return Refusal(MAKER, node.name, reason, predicate, info(node).path)


class Unfit(Exception):
    """Why a call cannot be read: one sentence and the name of the condition."""

    def __init__(self, reason: str, predicate: str) -> None:
        super().__init__(reason)
        self.reason, self.predicate = reason, predicate


def is_op(node: object, op: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and row_of(node).name == op


def argument(node: fx.Node, at: int, name: str) -> Any:
    """A positional or keyword argument of a call; None when it is absent."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one call that reads a value; None where there are several, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def constant(node: object) -> bool:
    """Whether a value hangs on parameters alone."""
    todo, seen = [node], set[object]()
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        if not isinstance(one, fx.Node) or one.op not in ("get_attr", "call_function"):
            return False
        if one.op == "call_function":
            if not one.all_input_nodes:
                return False
            todo += one.all_input_nodes
    return True


def constants(graph: fx.Graph) -> set[fx.Node]:
    """All values of a graph that hang on parameters alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        made = node.op == "call_function" and inputs and all(i in found for i in inputs)
        if made or node.op == "get_attr":
            found.add(node)
    return found


def is_sum(node: object) -> bool:
    """Whether a call adds two tensors as they are."""
    return (
        isinstance(node, fx.Node)
        and is_op(node, ADD)
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(a, fx.Node) for a in node.args)
        and node.args[0] is not node.args[1]
    )


def path_of(nodes: list[fx.Node]) -> str:
    """The module path of some calls, for people: what is common, and in braces what is not."""
    paths = list(dict.fromkeys(info(n).path for n in nodes))
    split = [p.split(".") for p in paths]
    if len(paths) == 1 or len({len(s) for s in split}) > 1:
        return paths[0]
    return ".".join(
        where[0] if len(set(where)) == 1 else "{" + ",".join(where) + "}"
        for where in zip(*split, strict=True)
    )
