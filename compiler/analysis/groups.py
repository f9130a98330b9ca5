"""Dependency groups: every parameter axis that must be cut, scaled or permuted together.

A group starts at one dimension of the graph and holds all that its units reach (see
:mod:`.spread`). Its kind says what a unit is; it is read off the data flow, never off names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from ..ir.dims import evaluate
from ..ir.graph import Program
from .blocks import is_block, segments_of
from .dimensions import TOP, Block, DimClass, Dimensions
from .flow import EXPERTS, LINEAR
from .spread import Spread, spread
from .ties import WHOLE_ATTENTION, as_int, op_name, shape_of

MODEL = "model"
"""The segment of a group that spans several."""

_PRODUCTS = frozenset({"aten.matmul.default", "aten.bmm.default", "aten.baddbmm.default"})
_WEIGHT_AXES = {LINEAR: {1: ("writes", "reads")}, EXPERTS: {3: "writes", 4: "reads"}}


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of a parameter that a group cuts.

    Attributes:
        unit_of: int64 [length of the axis], the unit of each index; -1: the group leaves it alone.
        role: ``writes`` (output axis of a matrix, or its bias), ``reads`` (input axis of a matrix),
            ``norm``, ``table`` (embedding) or ``other``.
        node: the call that reads the parameter.
    """

    param: str
    axis: int
    unit_of: Tensor
    role: str
    node: str


@dataclass(frozen=True, eq=False)
class Flow:
    """One axis of a value that a group runs through; ``unit_of`` as in :class:`Member`.

    Of an axis of B·n elements ``unit_of`` lists the n literal ones.
    """

    node: str
    axis: int
    part: int
    unit_of: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Parameter axes that move together, unit by unit.

    Attributes:
        id: ``<segment>/<kind><i>``, free of names.
        kind: neuron, head, kv_group, hidden, expert, rotary_pair, value_channel or channel.
        segment: its block, or ``model`` where it spans several.
        units: how many units; each kept unit keeps its indices of every member.
        members, values: parameter axes, and the axes of values that it flows through.
        norms: calls that normalise over it and must keep the whole divisor.
        chosen: calls in which units compete by value; a cut unit is one masked with -inf.
        least: units that must stay (as many experts as each token chooses).
        blocked: why it may not be cut: culprit and reason; empty where it may.
        bytes_per_unit: stored bytes of one unit. flops_per_unit: operations per token in its
            matrices (experts: of the tokens that choose it on average).
        node: the call at which it starts, where a refusal points.
        classes: dimension classes with the unit of each element, for the cut.
    """

    id: str
    kind: str
    segment: str
    units: int
    members: tuple[Member, ...]
    values: tuple[Flow, ...]
    norms: tuple[str, ...]
    chosen: tuple[str, ...]
    least: int
    blocked: tuple[Block, ...]
    bytes_per_unit: float
    flops_per_unit: float
    node: str
    classes: dict[int, Tensor] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The group as data, without its index maps."""
        return {
            "id": self.id, "kind": self.kind, "segment": self.segment, "units": self.units,
            "members": [
                {"param": m.param, "axis": m.axis, "role": m.role,
                 "indices_per_unit": int((m.unit_of >= 0).sum()) // self.units}
                for m in self.members
            ],
            "values": len(self.values), "norms": list(self.norms), "chosen": list(self.chosen),
            "least": self.least, "bytes_per_unit": self.bytes_per_unit,
            "flops_per_unit": self.flops_per_unit,
            "blocked": [{"node": b.node, "reason": b.reason} for b in self.blocked],
        }  # fmt: skip


def dependency_groups(program: Program, dims: Dimensions | None = None) -> list[Group]:
    """All groups that reach a parameter, the blocked ones too, in graph order."""
    return _Find(program, dims or Dimensions(program)).run()


def group_graph(groups: Sequence[Group]) -> nx.Graph:
    """Bipartite graph: group ids, and (parameter, axis) pairs with the count of indices per unit.

    Edges carry ``role`` and ``indices``, the indices of the axis that the group may cut.
    """
    g = nx.Graph()
    for group in groups:
        g.add_node(
            group.id, bipartite=0, kind=group.kind, units=group.units, blocked=bool(group.blocked)
        )
        for m in group.members:
            g.add_node((m.param, m.axis), bipartite=1, size=len(m.unit_of))
            g.add_edge(
                group.id, (m.param, m.axis), role=m.role, indices=int((m.unit_of >= 0).sum())
            )
    return g


def scoped_group(program: Program, dims: Dimensions, root: DimClass, without: Sequence[str],
                 name: str) -> Group:  # fmt: skip
    """The group of one class that does not cross relations of some kinds.

    ``without=("repeat",)`` parts key and value heads from the query heads that share them.
    """
    return _Find(program, dims).group(root, spread(dims, root.id, without), name)


class _Find:
    def __init__(self, program: Program, dims: Dimensions) -> None:
        self.program, self.dims = program, dims
        self.segment = {n: s.name for s in segments_of(program) for n in s.nodes}
        self.counts: dict[tuple[str, str], int] = {}
        self.rank = {str(n.target) if n.op == "get_attr" else n.name: i
                     for i, n in enumerate(program.graph.nodes)}  # fmt: skip

    def run(self) -> list[Group]:
        out: list[Group] = []
        covered: set[int] = set()
        refused: set[frozenset[int]] = set()
        made = self._composite()
        for late in (False, True):
            for c in self.dims.classes:
                size = as_int(c.size)
                if c.kind != "channel" or size is None or size < 2 or c.id in covered:
                    continue
                if (c.id in made) != late or (late and not c.params):
                    continue
                found = spread(self.dims, c.id)
                group = self.group(c, found)
                reached = frozenset(group.classes)
                if found.units < 2 or not group.members or reached in refused:
                    continue
                if group.blocked:
                    # What it reaches on the way may well be cut from another start.
                    refused.add(reached)
                    covered.add(c.id)
                else:
                    covered |= reached
                out.append(replace(group, id=self._name(group)))
        return sorted(out, key=lambda g: self.rank[g.node])

    def _composite(self) -> set[int]:
        """Classes made of others: their parts are what can be cut on its own."""
        out: set[int] = set()
        for r in self.dims.relations:
            if r.kind in ("split", "slice"):
                out.update(r.ins)
            elif r.kind in ("merge", "concat", "twice", "repeat"):
                # One head that all share is no part that could be cut in their stead.
                alone = r.kind == "repeat" and self.dims.classes[r.ins[0]].size == 1
                out.update(() if alone or r.ins == r.outs else r.outs)
        return out

    def _name(self, group: Group) -> str:
        index = self.counts.setdefault((group.segment, group.kind), 0)
        self.counts[group.segment, group.kind] += 1
        return f"{group.segment}/{group.kind}{index}"

    def group(self, root: DimClass, found: Spread, name: str = "") -> Group:
        """A group from what a spread reached."""
        classes = {
            c: torch.from_numpy(m).to(torch.int64) for c, m in found.maps.items() if (m >= 0).any()
        }
        parts = [self.dims.classes[c] for c in classes]
        values = tuple(
            Flow(a.node.name, a.axis, a.part, classes[c.id])
            for c in parts
            for a in c.members
            if a.node.op != "get_attr"
        )
        members = tuple(sorted(self._members(parts, classes), key=lambda m: self.rank[m.param]))
        kind = self._kind(parts, found)
        chosen = tuple(dict.fromkeys(n for c in parts for n in c.chosen))
        blocked = dict.fromkeys((*found.blocked, *(b for c in parts for b in c.blocked)))
        if chosen and kind != "expert":
            blocked[Block(chosen[0], "its channels compete by value")] = None
        segment = self._home(parts)
        bytes_, flops = self._costs(members, found.units)
        first = next((v.node for v in values), members[0].node if members else "")
        return Group(
            name, kind, segment, found.units, members, values,
            tuple(dict.fromkeys(n for c in parts for n in c.norms)), chosen,
            max([1, *(self._chooses(n) for n in chosen)]), tuple(blocked), bytes_, flops, first,
            classes,
        )  # fmt: skip

    def _members(self, parts: list[DimClass], classes: dict[int, Tensor]) -> Iterator[Member]:
        for c in parts:
            for name, axis in c.params:
                node = self.program.param_node(name)
                reader = next(iter(node.users))
                yield Member(name, axis, classes[c.id], _role(node, reader, axis), reader.name)

    def _chooses(self, name: str) -> int:
        node = self.program.node(name)
        return int(node.args[1]) if op_name(node) == TOP else 1  # type: ignore[arg-type]

    def _home(self, parts: list[DimClass]) -> str:
        """The one block that works on it; constants such as rotary angles lie outside."""
        names = {
            self.segment[a.node.name] for c in parts for a in c.members if a.node.op != "get_attr"
        } or {self.segment[a.node.name] for c in parts for a in c.members}
        return names.pop() if len(names) == 1 else MODEL

    def _kind(self, parts: list[DimClass], found: Spread) -> str:
        seen: set[str] = set()
        for c in parts:
            for a in c.members:
                for user in a.node.users:
                    for place, value in enumerate(user.args):
                        if value is a.node:
                            seen.add(_meaning(user, place, a.axis, c))
        if "expert" in seen:
            return "expert"
        if "kv" in seen or "head" in seen:
            return "kv_group" if "shared" in self._sharing(parts) else "head"
        if "key" in seen:
            return "rotary_pair" if "pair" in found.kinds else "channel"
        if "value" in seen:
            return "value_channel"
        blocks = {self.segment[a.node.name] for c in parts for a in c.members if a.node.users}
        if sum(is_block(b) for b in blocks) > 1 or self._streams(parts):
            return "hidden"
        if any(c.norms for c in parts):
            return "channel"
        return "neuron" if {"writes", "reads"} <= self._roles(parts) else "channel"

    def _roles(self, parts: list[DimClass]) -> set[str]:
        return {
            _role(node, next(iter(node.users)), axis)
            for c in parts
            for name, axis in c.params
            for node in (self.program.param_node(name),)
        }

    def _sharing(self, parts: list[DimClass]) -> set[str]:
        """Whether query heads share a key head anywhere here."""
        ids = {c.id for c in parts}
        return {
            "shared"
            for r in self.dims.relations
            if r.kind == "repeat" and as_int(r.factor) not in (None, 1) and set(r.ins) <= ids
        }

    def _streams(self, parts: list[DimClass]) -> bool:
        """Whether it is the width of an embedding that blocks read: a model of a single block."""
        roles = self._roles(parts)
        return "table" in roles and {"reads", "writes"} <= roles

    def _costs(self, members: Sequence[Member], units: int) -> tuple[float, float]:
        bytes_ = flops = 0.0
        for m in members:
            param = self.program.params[m.param]
            share = float((m.unit_of >= 0).sum()) / len(m.unit_of) / units
            bytes_ += param.bytes * share
            if len(param.shape) > 1:
                # A tied head multiplies by the table that embeds.
                node = self.program.param_node(m.param)
                for reader in node.users:
                    if _role(node, reader, m.axis) in ("writes", "reads"):
                        count = 2 * param.bytes // param.dtype.itemsize
                        flops += count * share * self._active(reader.name)
        return bytes_, flops

    def _active(self, name: str) -> float:
        """Share of a parameter that a token meets: k of E experts, else all of it."""
        node = self.program.node(name)
        if op_name(node) != EXPERTS:
            return 1.0
        chosen, experts = shape_of(node.args[1]), shape_of(node.args[3])
        assert chosen is not None
        assert experts is not None
        return evaluate(chosen[-1], {}) / evaluate(experts[0], {})


def _meaning(user: fx.Node, place: int, axis: int, c: DimClass) -> str:
    """What an operand's axis is to the call that reads it."""
    name = op_name(user)
    if name == EXPERTS and place in (3, 4) and axis == 0:
        return "expert"
    rank = len(shape_of(user.args[place]) or ())
    if name in WHOLE_ATTENTION and place in (0, 1, 2):
        if axis == rank - 3:
            return "kv" if place else "head"
        if axis == rank - 1:
            return "value" if place == 2 else "key"
    lead = 1 if name == "aten.baddbmm.default" else 0
    if name in _PRODUCTS and place >= lead and all(map(_computed, user.args[lead : lead + 2])):
        # Attention that is written out: q · kᵀ contracts the keys' channels, weights · v keeps v's.
        if axis < rank - 2:
            return "head"
        if axis == rank - 1:
            return "key" if place == lead else "value"
        return "" if place == lead else "key"
    return ""


def _computed(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function"


def _role(node: fx.Node, reader: fx.Node, axis: int) -> str:
    """What a parameter's axis is to the call that reads it."""
    name = op_name(reader)
    places = [i for i, a in enumerate(reader.args) if a is node]
    place = places[0] if places else -1
    if name == LINEAR:
        return "reads" if place == 1 and axis == 1 else "writes"
    if name == EXPERTS:
        if axis == 0:
            return "other"
        return "reads" if (place, axis) in ((3, 2), (4, 2)) else "writes"
    if name in ("llmc.rms_norm", "llmc.layer_norm"):
        return "norm"
    if name == "aten.embedding.default":
        return "table" if axis == 1 else "other"
    return "other"
