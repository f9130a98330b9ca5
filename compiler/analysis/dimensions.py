"""Dimension classes: which axes of which values and parameters are one and the same dimension.

Ties of the op rows are followed with a union-find. ``same`` and ``contract`` ties join axes;
splits, merges, repeats, concatenations and slices are kept as relations with index maps; what mixes
an axis, or says nothing about it, blocks its class from being cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ..ir.dims import Dim
from ..ir.errors import ModelError
from ..ir.graph import Program
from .ties import (
    Axis,
    as_int,
    calls,
    is_batch,
    is_element,
    is_sequence,
    op_name,
    parts_of,
    shape_of,
    ties_of,
)

_JOINS = ("same", "contract")
_RELATES = ("split", "merge", "repeat", "concat", "slice")


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
        blocked: what forbids cutting it.
    """

    id: int
    size: Dim
    kind: Literal["sequence", "batch", "channel"]
    members: tuple[Axis, ...]
    params: tuple[tuple[str, int], ...]
    norms: tuple[str, ...]
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
        blocks: list[tuple[Axis, Block]] = []
        norms: list[tuple[Axis, str]] = []
        related: list[tuple[str, str, list[Axis], list[Axis], Dim, int]] = []
        for node in program.graph.nodes:
            for axis in axes_of(node):
                self._find(axis)
        for node in calls(program.graph):
            ties = ties_of(node)
            spoken: set[Axis] = set()
            for tie in ties or ():
                both = [*tie.ins, *tie.outs]
                spoken.update(both)
                if tie.kind in _JOINS:
                    for other in both[1:]:
                        self._join(both[0], other)
                elif tie.kind in _RELATES:
                    parts = (list(tie.ins), list(tie.outs))
                    related.append((tie.kind, node.name, *parts, tie.factor, tie.offset))
                elif tie.kind == "norm":
                    norms += [(a, node.name) for a in tie.ins]
                else:
                    blocks += [(a, Block(node.name, f"{op_name(node)} mixes it")) for a in both]
            what = "has no tie rule" if ties is None else "says nothing about it"
            for a in (x for v in (*node.all_input_nodes, node) for x in axes_of(v)):
                if a not in spoken and _size(a) != 1 and not _element(node, a):
                    blocks.append((a, Block(node.name, f"{op_name(node)} {what}")))
        self.classes = self._classes(program, blocks, norms)
        self.relations = [
            Relation(
                kind,
                node,
                tuple(self.of(*a).id for a in ins),
                tuple(self.of(*a).id for a in outs),
                factor,
                offset,
            )
            for kind, node, ins, outs, factor, offset in related
        ]

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

    def _classes(
        self, program: Program, blocks: list[tuple[Axis, Block]], norms: list[tuple[Axis, str]]
    ) -> list[DimClass]:
        members: dict[Axis, list[Axis]] = {}
        for a in list(self.parent):
            members.setdefault(self._find(a), []).append(a)
        self._index = {a: i for i, group in enumerate(members.values()) for a in group}
        blocked: dict[int, dict[Block, None]] = {}
        for a, block in blocks:
            blocked.setdefault(self._index[a], {})[block] = None
        normed: dict[int, dict[str, None]] = {}
        for a, name in norms:
            normed.setdefault(self._index[a], {})[name] = None
        out = []
        for i, group in enumerate(members.values()):
            size = _size(group[0])
            params = [
                (str(a.node.target), a.axis) for a in group if program.param_of(a.node) is not None
            ]
            out.append(
                DimClass(
                    i,
                    size,
                    "sequence" if is_sequence(size) else "batch" if is_batch(size) else "channel",
                    tuple(group),
                    tuple(params),
                    tuple(normed.get(i, ())),
                    tuple(blocked.get(i, ())),
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
