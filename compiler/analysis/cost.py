"""What a program costs: operations, bytes moved and activation memory, from the op rows.

Numbers are counts of the graph as written, for a given batch and sequence length: multiply and add
operations, bytes read and written when every op runs by itself. Views move nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from ..ir.dims import Dim, evaluate
from ..ir.errors import UsageError
from ..ir.graph import Program, Segment, info
from ..ir.ops.base import cost, row_of
from ..ir.types import show_type, total_bytes
from .blocks import segments_of
from .flow import CUTS, VIEWS
from .ties import is_element, op_name

# Ops whose result shares its memory with their first argument.
_SHARES = VIEWS | CUTS | {"aten.expand.default", "aten.select.int", "aten.unbind.int"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of a node or a segment.
        op: the op row of a node, ``""`` for a segment.
        flops: multiply and add operations.
        moved: bytes of activations and of weights as stored, read and written.
        weights: bytes of the parameters, as stored, that lie in it.
        peak: largest sum of bytes of values alive at once inside a segment, its inputs included;
            for a node the bytes of its result.
    """

    name: str
    op: str
    flops: int
    moved: int
    weights: int
    peak: int


def is_view(node: fx.Node) -> bool:
    """Whether a call's result shares memory with its first argument."""
    return op_name(node) in _SHARES or is_element(node)


class CostModel:
    """Costs of one program for one batch and sequence length.

    Raises:
        UsageError: batch or length below 1.
    """

    def __init__(self, program: Program, batch: int, length: int) -> None:
        if batch < 1 or length < 1:
            raise UsageError(f"expected batch and length of at least 1, found {batch}, {length}")
        self.program = program
        self.values = {"B": batch, "S": length}
        self.by_name = {n.name: n for n in program.graph.nodes}
        self._known: dict[str, int] = {}
        self._bytes: dict[fx.Node, int] = {}

    def number(self, d: Dim) -> int:
        """A dim's value; symbols of declared state (tokens already cached) count as the length."""
        free = {} if isinstance(d, int) else {s.name: self.values["S"] for s in d.free_symbols}
        return evaluate(d, free | self.values)

    def bytes_of(self, node: fx.Node) -> int:
        """Bytes of a value; of a parameter as it is stored."""
        if node not in self._bytes:
            param = self.program.param_of(node)
            found = param.bytes if param else self.number(total_bytes(info(node).type))
            self._bytes[node] = found
        return self._bytes[node]

    def node(self, node: fx.Node) -> Row:
        """Cost of one node."""
        param = self.program.param_of(node)
        size = self.bytes_of(node) if node.op != "output" else 0
        if node.op != "call_function":
            weights = param.bytes if param else 0
            return Row(node.name, "", 0, 0, weights, 0 if param else size)
        op = row_of(node).name
        if is_view(node):
            return Row(node.name, op, 0, 0, 0, 0)
        types = ",".join(show_type(info(i).type) for i in node.all_input_nodes)
        rest = [a for a in node.args if not isinstance(a, fx.Node)]
        key = f"{op}({types};{rest};{sorted(node.kwargs.items())}){show_type(info(node).type)}"
        if key not in self._known:
            self._known[key] = self.number(cost(node)[0])
        moved = size + sum(self.bytes_of(i) for i in node.all_input_nodes)
        return Row(node.name, op, self._known[key], moved, 0, size)

    def segment(self, segment: Segment) -> Row:
        """Cost of one segment."""
        rows = [self.node(self.by_name[n]) for n in segment.nodes]
        return Row(
            segment.name,
            "",
            sum(r.flops for r in rows),
            sum(r.moved for r in rows),
            sum(r.weights for r in rows),
            self.peak(segment),
        )

    def peak(self, segment: Segment) -> int:
        """Bytes of activations alive at once, at most, while the segment runs by itself.

        Inputs of the segment live throughout, its outputs to its end, everything else from the node
        that makes it to its last reader. Parameters are not counted.
        """
        nodes = [self.by_name[n] for n in segment.nodes if self.by_name[n].op != "output"]
        root: dict[fx.Node, fx.Node] = {}
        last: dict[fx.Node, int] = {}
        for i, n in enumerate(nodes):
            shares = n.op == "call_function" and is_view(n) and n.all_input_nodes
            root[n] = root.get(n.all_input_nodes[0], n.all_input_nodes[0]) if shares else n
            for value in (n, *n.all_input_nodes):
                last[root.get(value, value)] = i
        for name in segment.live_out:
            value = self.by_name[name]
            last[root.get(value, value)] = len(nodes)
        inputs = [self.by_name[n] for n in segment.live_in]
        alive = {root.get(v, v) for v in inputs if v.op != "get_attr"}
        held = set(alive)
        now = top = sum(self.bytes_of(v) for v in alive)
        for i, n in enumerate(nodes):
            if root[n] is n and n.op != "get_attr" and n not in alive:
                alive.add(n)
                now += self.bytes_of(n)
            top = max(top, now)
            for value in {root.get(v, v) for v in (n, *n.all_input_nodes)}:
                if value in alive and value not in held and last[value] <= i:
                    alive.remove(value)
                    now -= self.bytes_of(value)
        return top

    def table(self) -> dict[str, Any]:
        """JSON-able table: batch, length, one row per segment and the total.

        The total's ``peak`` is the largest of the segments', as they run one after another.
        """
        rows = [self.segment(s) for s in segments_of(self.program)]
        total = Row(
            "total",
            "",
            sum(r.flops for r in rows),
            sum(r.moved for r in rows),
            sum(r.weights for r in rows),
            max((r.peak for r in rows), default=0),
        )
        return {
            "batch": self.values["B"],
            "length": self.values["S"],
            "segments": [asdict(r) for r in rows],
            "total": asdict(total),
        }

    def nodes(self) -> list[dict[str, Any]]:
        """JSON-able rows of all call nodes, each with its segment's name."""
        return [
            {"segment": s.name} | asdict(self.node(self.by_name[n]))
            for s in segments_of(self.program)
            for n in s.nodes
            if self.by_name[n].op == "call_function"
        ]
