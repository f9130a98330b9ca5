"""Declarative patterns over call nodes: what must be there, bound by name, read by nobody else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ...ir.events import rule_event, tell
from ...ir.graph import Program, tensor_type
from ...ir.ops import row_of
from ...ir.refusal import Refusal
from ...ir.types import TensorType

Bound = dict[str, Any]


@dataclass(frozen=True)
class Var:
    """Any value, bound to a name; a second occurrence must be the same value."""

    name: str


@dataclass(frozen=True)
class Tensor:
    """A node of the given rank, bound to a name."""

    name: str
    rank: int


@dataclass(frozen=True)
class Number:
    """A literal number, bound to a name; with ``value`` only that one (relative 1e-6)."""

    name: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Last:
    """The last axis of the call's first argument, alone or as a list of one."""


@dataclass(frozen=True)
class Either:
    """The first of several patterns that matches."""

    options: tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """A call of one of the named op rows; missing trailing patterns leave arguments unchecked.

    ``commutes``: the first two arguments may be swapped. ``bind`` names the node itself.
    ``free``: a view that others may read too; it stays where they do.
    """

    ops: tuple[str, ...]
    args: tuple[Any, ...]
    commutes: bool = False
    bind: str = ""
    free: bool = False


def call(ops: str, *args: Any, bind: str = "", free: bool = False) -> Call:
    """A :class:`Call`; ``ops`` lists aten overloads or llmc ops, apart by ``|``."""
    names = tuple(o if "." in o and o.startswith("llmc") else f"aten.{o}" for o in ops.split("|"))
    commutes = all(n in ("aten.mul.Tensor", "aten.add.Tensor") for n in names)
    return Call(names, args, commutes, bind, free)


@dataclass
class Match:
    """A matched pattern: the root, what names are bound to, and the nodes inside, root included."""

    root: fx.Node
    bound: Bound
    inside: list[fx.Node] = field(default_factory=list)

    def outside_user(self) -> fx.Node | None:
        """A node inside, other than the root, that something outside reads too."""
        inside = set(self.inside)
        for node in self.inside:
            if node is not self.root and any(u not in inside for u in node.users):
                return node
        return None


def match(pattern: Any, root: fx.Node) -> Match | None:
    """Match a pattern at a node."""
    for bound, inside in _match(pattern, root, None, {}):
        return Match(root, bound, list(dict.fromkeys(inside)))
    return None


def _match(
    pattern: Any, value: Any, parent: fx.Node | None, bound: Bound
) -> Iterator[tuple[Bound, list[fx.Node]]]:
    if isinstance(pattern, (Var, Tensor)):
        if isinstance(pattern, Tensor):
            ok = isinstance(value, fx.Node) and isinstance(value.meta["llmc"].type, TensorType)
            if not ok or tensor_type(value).rank != pattern.rank:
                return
        known = bound.get(pattern.name, _NONE)
        if known is _NONE:
            yield {**bound, pattern.name: value}, []
        elif known is value:
            yield bound, []
    elif isinstance(pattern, Number):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        if pattern.value is None or abs(value - pattern.value) <= 1e-6 * max(
            1.0, abs(pattern.value)
        ):
            yield ({**bound, pattern.name: value} if pattern.name else bound), []
    elif isinstance(pattern, Last):
        assert parent is not None
        first = parent.args[0]
        first = first[0] if isinstance(first, (list, tuple)) else first
        assert isinstance(first, fx.Node)
        axis = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        if axis in (-1, tensor_type(first).rank - 1):
            yield bound, []
    elif isinstance(pattern, Either):
        for option in pattern.options:
            yield from _match(option, value, parent, bound)
    elif isinstance(pattern, Call):
        yield from _match_call(pattern, value, bound)
    elif isinstance(pattern, (list, tuple)):
        if isinstance(value, (list, tuple)) and len(value) == len(pattern):
            yield from _match_all(list(pattern), list(value), parent, bound)
    elif pattern == value and type(pattern) is type(value):
        yield bound, []


_NONE = object()


def _match_call(pattern: Call, value: Any, bound: Bound) -> Iterator[tuple[Bound, list[fx.Node]]]:
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return
    if row_of(value).name not in pattern.ops or len(value.args) < len(pattern.args):
        return
    args = list(value.args[: len(pattern.args)])
    orders = [args]
    if pattern.commutes and len(args) >= 2:
        orders.append([args[1], args[0], *args[2:]])
    for order in orders:
        for found, inside in _match_all(list(pattern.args), order, value, bound):
            here = {**found, pattern.bind: value} if pattern.bind else found
            yield here, inside if pattern.free else [*inside, value]


def _match_all(
    patterns: list[Any], values: list[Any], parent: fx.Node | None, bound: Bound
) -> Iterator[tuple[Bound, list[fx.Node]]]:
    if not patterns:
        yield bound, []
        return
    for found, inside in _match(patterns[0], values[0], parent, bound):
        for more, rest in _match_all(patterns[1:], values[1:], parent, found):
            yield more, [*inside, *rest]


def position(node: fx.Node) -> Any:
    """What sorts nodes by their place in the graph, known without a walk over it."""
    return node._sort_key


@dataclass(frozen=True)
class Lift:
    """One rewrite of a cluster into a semantic op; exact, tested on captured models.

    Attributes:
        name: of the lift, for provenance and refusals.
        patterns: alternatives, the largest first.
        build: (program, match) -> the replacement of the root, or a reason not to.
        anchors: op rows whose calls, left over, are near misses.
    """

    name: str
    patterns: tuple[Any, ...]
    build: Callable[[Program, Match], fx.Node | str]
    anchors: tuple[str, ...] = ()

    def run(self, program: Program) -> list[Refusal]:
        """Rewrite every match, then report what looked like one."""
        began, taken = time.perf_counter(), 0
        refused: dict[str, Refusal] = {}
        for pattern in self.patterns:
            for node in list(program.graph.nodes):
                if node.op != "call_function" or node.meta.get("llmc_gone"):
                    continue
                found = match(pattern, node)
                if found is None:
                    continue
                problem = self._apply(program, found)
                taken += problem is None
                if problem is not None:
                    for inner in found.inside:
                        refused[inner.name] = problem
        out: list[Refusal] = []
        for node in program.calls():
            if row_of(node).name in self.anchors:
                found_one = refused.get(node.name)
                path = node.meta["llmc"].path
                out.append(
                    found_one
                    or Refusal(f"normalise.{self.name}", node.name, "no known form", "form", path)
                )
        alive = {n.name for n in program.graph.nodes}
        out = list(dict.fromkeys(out + [r for r in refused.values() if r.node in alive]))
        tell(rule_event(f"normalise.{self.name}", taken, out, len(alive), began))
        return out

    def _apply(self, program: Program, found: Match) -> Refusal | None:
        path = found.root.meta["llmc"].path
        by = f"normalise.{self.name}"
        outside = found.outside_user()
        if outside is not None:
            reason = f"{outside.name} is read outside the cluster too"
            return Refusal(by, outside.name, reason, "single_user", path)
        new = self.build(program, found)
        if isinstance(new, str):
            return Refusal(by, found.root.name, new, "form", path)
        found.root.replace_all_uses_with(new)
        for node in sorted(found.inside, key=position, reverse=True):
            if not node.users:
                node.meta["llmc_gone"] = True
                program.graph.erase_node(node)
        return None


def emit(
    program: Program, found: Match, made_by: str, op: str, *args: Any, **kwargs: Any
) -> fx.Node:
    """The replacement call, placed at the root with the root's provenance."""
    return program.emit(
        op, *args, before=found.root, made_by=f"normalise.{made_by}", like=found.root, **kwargs
    )
