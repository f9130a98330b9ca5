"""Dimension classes: which axes of which values and parameters are one and the same dimension.

Ties of the op rows are followed with a union-find. ``same``, ``contract``, ``pair`` and ``choose``
ties join axes; splits, merges, repeats, concatenations, slices, pairs and doubled axes are kept as
relations with index maps; what mixes an axis, or says nothing about it, blocks its class from being
cut. So do the program's inputs and results, whose sizes are its interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ..ir.dims import Dim
from ..ir.errors import ModelError
from ..ir.graph import Program
from .flow import is_move
from .ties import (
    Axis,
    BoundTie,
    as_int,
    calls,
    is_batch,
    is_element,
    is_sequence,
    op_name,
    operands,
    parts_of,
    shape_of,
    ties_of,
)

TOP = "aten.topk.default"
_JOINS = ("same", "contract", "pair", "choose")
_RELATES = ("split", "merge", "repeat", "concat", "slice")
# Rows of norms that can keep the divisor of the whole axis when it is cut.
_COUNTED = ("llmc.rms_norm", "llmc.layer_norm")


@dataclass(frozen=True)
class Block:
    """Why a class may not be cut or permuted: the culprit node and what it does."""

    node: str
    reason: str


@dataclass(frozen=True)
class DimClass:
    """One dimension.

    Attributes:
        id: number within the program, in order of first appearance.
        size: its length.
        kind: ``sequence`` (any axis with S in it), ``batch``, or ``channel``.
        members: (node, axis, element of a tuple) of all values with it, parameters too.
        params: (parameter name, axis) among them.
        norms: nodes that normalise over it (it can be cut where their divisor is kept).
        chosen: nodes along it whose entries compete by value (softmax, top-k).
        sources: nodes that count along it, from which a cut selects.
        blocked: what forbids cutting it.
    """

    id: int
    size: Dim
    kind: Literal["sequence", "batch", "channel"]
    members: tuple[Axis, ...]
    params: tuple[tuple[str, int], ...]
    norms: tuple[str, ...]
    chosen: tuple[str, ...]
    sources: tuple[str, ...]
    blocked: tuple[Block, ...]


@dataclass(frozen=True)
class Relation:
    """How the classes ``ins`` become the classes ``outs`` at one node (kinds: see ``Tie``)."""

    kind: str
    node: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    factor: Dim = 1
    offset: int = 0

    def index_map(self, size: int) -> torch.Tensor:
        """int64 [size]: for each element of the result the element of the operand that it holds.

        Split and merged axes are counted flat, outer to inner. For ``concat`` the map runs from the
        operand's elements to their places in the result.
        """
        at = torch.arange(size)
        if self.kind in ("pair", "twice"):
            raise ModelError(f"expected a relation with one index map, found {self.kind}")
        if self.kind == "repeat":
            factor = as_int(self.factor)
            if factor is None:
                raise ModelError(f"expected a literal factor, found {self.factor}", where=self.node)
            return at // factor
        return at + self.offset if self.kind in ("slice", "concat") else at


class Dimensions:
    """The classes and relations of one program."""

    def __init__(self, program: Program) -> None:
        self.parent: dict[Axis, Axis] = {}
        self._notes: dict[str, list[tuple[Axis, Any]]] = {
            "norm": [], "choose": [], "source": [], "block": [],
        }  # fmt: skip
        related: list[tuple[BoundTie, tuple[Axis, ...], tuple[Axis, ...]]] = []
        picks: list[BoundTie] = []
        for node in program.graph.nodes:
            for axis in axes_of(node):
                self._find(axis)
        for node in calls(program.graph):
            ties = ties_of(node)
            spoken: set[Axis] = set()
            for tie in ties or ():
                both = (*tie.ins, *tie.outs)
                spoken.update(both)
                if tie.kind in _JOINS:
                    for other in both[1:]:
                        self._join(both[0], other)
                if tie.kind in _RELATES:
                    related.append((tie, tie.ins, tie.outs))
                elif tie.kind in ("pair", "twice"):
                    related.append((tie, both[:1], both[1:2]))
                elif tie.kind == "pick":
                    picks.append(tie)
                elif tie.kind == "norm" and op_name(node) not in _COUNTED:
                    self._block(both, node, "cannot keep its divisor")
                elif tie.kind in self._notes:
                    self._notes[tie.kind] += [(a, node.name) for a in both[:1]]
                elif tie.kind not in _JOINS:
                    self._block(both, node, "mixes it")
            what = "has no tie rule" if ties is None else "says nothing about it"
            for v in (*node.all_input_nodes, node):
                unsaid = (a for a in axes_of(v) if a not in spoken)
                self._block([a for a in unsaid if _size(a) != 1 and not _element(node, a)],
                            node, what)  # fmt: skip
        for node in (*program.inputs, *program.output.all_input_nodes):
            end = "is an input" if node.op == "placeholder" else "is the result"
            axes = [a for a in axes_of(node) if isinstance(_size(a), int) and _size(a) != 1]
            self._notes["block"] += [
                (a, Block(node.name, f"it {end} of the program")) for a in axes
            ]
        for tie in picks:
            self._picked(tie)
        self.classes = self._classes(program)
        self.relations = [
            Relation(
                tie.kind,
                tie.node.name,
                tuple(self.of(*a).id for a in ins),
                tuple(self.of(*a).id for a in outs),
                tie.factor,
                tie.offset,
            )
            for tie, ins, outs in related
        ]
        self._touching: dict[int, list[Relation]] = {}
        for r in self.relations:
            for c in dict.fromkeys((*r.ins, *r.outs)):
                self._touching.setdefault(c, []).append(r)

    def touching(self, id: int) -> list[Relation]:
        """The relations that a class takes part in."""
        return self._touching.get(id, [])

    def _block(self, axes: Sequence[Axis], node: fx.Node, why: str) -> None:
        block = Block(node.name, f"{op_name(node)} {why}")
        self._notes["block"] += [(a, block) for a in axes]

    def _picked(self, tie: BoundTie) -> None:
        """Indices that were chosen along an axis count another one: the two are one dimension."""
        found = operands(tie.node)[tie.offset]
        index = found[0] if isinstance(found, tuple) else None
        while (
            index is not None and is_move(index) and op_name(index.args[0]) != "aten.topk.default"
        ):
            index = index.args[0]
        if index is not None and is_element(index):
            top = index.args[0]
            over = [t.ins[0] for t in ties_of(top) or () if t.kind == "choose"]
            if over and _size(over[0]) == _size(tie.ins[0]):
                self._join(over[0], tie.ins[0])
                self._notes["choose"].append((tie.ins[0], tie.node.name))
                return
        self._block(tie.ins, tie.node, "picks from it at indices of another origin")

    def of(self, node: fx.Node, axis: int, part: int = 0) -> DimClass:
        """The class of one axis.

        Raises:
            ModelError: the value has no such axis.
        """
        found = self._index.get(Axis(node, axis % max(len(shape_of(node, part) or ()), 1), part))
        if found is None:
            raise ModelError(f"expected a tensor axis {axis} of {node.name}, found none")
        return self.classes[found]

    def _find(self, a: Axis) -> Axis:
        self.parent.setdefault(a, a)
        while self.parent[a] != a:
            self.parent[a] = self.parent[self.parent[a]]
            a = self.parent[a]
        return a

    def _join(self, a: Axis, b: Axis) -> None:
        self.parent[self._find(b)] = self._find(a)

    def _classes(self, program: Program) -> list[DimClass]:
        members: dict[Axis, list[Axis]] = {}
        for a in list(self.parent):
            members.setdefault(self._find(a), []).append(a)
        self._index = {a: i for i, group in enumerate(members.values()) for a in group}
        notes: dict[str, dict[int, dict[Any, None]]] = {}
        for kind, found in self._notes.items():
            for a, what in found:
                notes.setdefault(kind, {}).setdefault(self._index[a], {})[what] = None
        out = []
        for i, group in enumerate(members.values()):
            size = _size(group[0])
            params = [
                (str(a.node.target), a.axis) for a in group if program.param_of(a.node) is not None
            ]
            said = {k: tuple(notes.get(k, {}).get(i, ())) for k in self._notes}
            out.append(
                DimClass(
                    i,
                    size,
                    "sequence" if is_sequence(size) else "batch" if is_batch(size) else "channel",
                    tuple(group),
                    tuple(params),
                    said["norm"],
                    said["choose"],
                    said["source"],
                    said["block"],
                )
            )
        return out


def axes_of(node: fx.Node) -> Iterator[Axis]:
    """Every axis of a value, of all elements where it is a tuple."""
    if "llmc" in node.meta and node.op != "output":
        for part in range(parts_of(node)):
            for a in range(len(shape_of(node, part) or ())):
                yield Axis(node, a, part)


def _size(a: Axis) -> Dim:
    shape = shape_of(a.node, a.part)
    assert shape is not None
    return shape[a.axis]


def _element(node: fx.Node, a: Axis) -> bool:
    """Whether ``a`` belongs to an element of a tuple that this getitem does not take."""
    return is_element(node) and a.node is not node and a.part != node.args[1]
