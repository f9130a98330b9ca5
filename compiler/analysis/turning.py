"""Where a rotation of channels is free: the residual stream, and the values of attention.

The stream can be turned where each call that touches it keeps an orthogonal map of its channels:
matrices and tables turn with it, sums and factors per token let it pass, an rms_norm does behind
whose gain all readers are matrices. A layer_norm is an rms_norm of a stream whose mean is taken
away, which what writes the stream can do. The values of a head turn where only the output
projection reads them. Sources: SliceGPT (arXiv 2401.15024), QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..ir.graph import Program, info
from ..ir.refusal import Refusal
from .absorb import argument
from .flow import CUTS, EXPERTS, LINEAR, MOVES
from .groups import Group, dependency_groups
from .heads import AttentionSite, attention_sites
from .linears import sole_param
from .ties import as_int, op_name, shape_of

_BY = "rotate"
_TABLE = "aten.embedding.default"
_NORMS = ("llmc.rms_norm", "llmc.layer_norm")
_SUMS = frozenset({"aten.add.Tensor", "aten.sub.Tensor"})
_FACTORS = frozenset({
    "aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar", "aten.neg.default",
})  # fmt: skip
_PARTS = MOVES | CUTS | {"aten.index_select.default", "aten.select.int", "aten.expand.default"}


@dataclass(frozen=True, eq=False)
class Side:
    """One axis of one parameter that turns.

    Attributes:
        reads: it reads the channels; else it writes them (a table does).
        index: int64 [G, n], the entries of each run of channels; None: all of them are one run.
    """

    param: str
    axis: int
    reads: bool
    index: Tensor | None = None


@dataclass(frozen=True)
class Fold:
    """A norm that loses its gain and bias to the matrices that read it.

    Attributes:
        node: the norm; gain: its parameter, ``offset`` is added to it; bias: of a layer_norm.
        readers: (call, weight, axis, bias of the call).
    """

    node: str
    gain: str | None
    offset: float
    bias: str | None
    readers: tuple[tuple[str, str, int, str | None], ...]


@dataclass(frozen=True, eq=False)
class TurnSite:
    """Channels that can be turned without changing the model.

    Attributes:
        id: ``model/stream<i>`` or ``<segment>/values<i>``; kind: stream or values.
        width: channels that are mixed together.
        sides: parameters that turn; folds: norms on the way.
        ahead: calls behind which the value is turned online, as a table has other readers too.
        back: calls whose first operand is turned back online, for the same reason.
        centred: what writes the channels takes their mean away first.
    """

    id: str
    kind: str
    segment: str
    node: str
    width: int
    sides: tuple[Side, ...]
    folds: tuple[Fold, ...] = ()
    ahead: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    centred: bool = False


class Fixed(Exception):
    """Why channels cannot be turned: (predicate, reason, culprit)."""

    def __init__(self, predicate: str, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.predicate, self.node = predicate, node


def turn_sites(program: Program, groups: list[Group] | None = None) -> list[TurnSite | Refusal]:
    """Streams, then the values of each attention; refusals name the culprit."""
    out: list[TurnSite | Refusal] = []
    hidden = [g for g in groups or dependency_groups(program) if g.kind == "hidden"]
    for i, group in enumerate(hidden):
        try:
            out.append(_Stream(program, group).site(f"{group.segment}/stream{i}"))
        except Fixed as no:
            reason = f"{group.id} cannot be turned: {no}"
            out.append(Refusal(_BY, no.node.name, reason, no.predicate, info(no.node).path))
    return out + [_values(program, s) for s in attention_sites(program)]


def _values(program: Program, site: AttentionSite | Refusal) -> TurnSite | Refusal:
    if isinstance(site, Refusal):
        return Refusal(_BY, site.node, site.reason, site.predicate, site.path)
    path = info(program.node(site.node)).path
    if site.fixed_values or site.o is None:
        why = f"the values of {site.node} cannot be turned: {site.fixed_values}"
        return Refusal(_BY, site.node, why, "values_traced", path)
    v, o = site.v, site.o
    if v.index.shape[1] != o.index.shape[1] or v.index.shape[1] < 2:
        why = f"{site.node} has values of {v.index.shape[1]} channels"
        return Refusal(_BY, site.node, why, "values_traced", path)
    sides = [Side(v.param, 0, False, v.index), Side(o.param, 1, True, o.index)]
    if v.bias is not None:
        sides.append(Side(v.bias, 0, False, v.index))
    name = site.id.replace("attention", "values")
    return TurnSite(name, "values", site.segment, site.node, v.index.shape[1], tuple(sides))


@dataclass
class _Stream:
    """The proof for one group of channels, call by call."""

    program: Program
    group: Group
    flows: set[fx.Node] = field(default_factory=set)
    plain: set[fx.Node] = field(default_factory=set)
    normed: set[fx.Node] = field(default_factory=set)
    sides: dict[tuple[str, int], Side] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    ahead: list[str] = field(default_factory=list)
    back: list[str] = field(default_factory=list)

    def site(self, name: str) -> TurnSite:
        """Raises Fixed where a call does not let the channels turn."""
        group = self.group
        for blocked in group.blocked:
            raise Fixed("group_free", blocked.reason, self.program.node(blocked.node))
        for flow in group.values:
            node = self.program.node(flow.node)
            rank = len(shape_of(node, flow.part) or ())
            whole = torch.equal(flow.unit_of, torch.arange(group.units))
            if flow.part or flow.axis != rank - 1 or not whole:
                raise Fixed("whole_axis", f"{node.name} holds its channels in another way", node)
            self.flows.add(node)
        touched = [n for n in self.program.graph.nodes if self.touches(n)]
        for node in touched:
            if op_name(node) in _NORMS:
                self.norm(node)
        for node in touched:
            if node not in self.plain and op_name(node) not in _NORMS:
                self.call(node)
        self.complete()
        centred = any(op_name(self.program.node(f.node)) == _NORMS[1] for f in self.folds)
        if centred:
            self.centre(touched)
        return TurnSite(
            name, "stream", group.segment, group.node, group.units, tuple(self.sides.values()),
            tuple(self.folds), tuple(self.ahead), tuple(self.back), centred,
        )  # fmt: skip

    def touches(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return False
        return node in self.flows or any(i in self.flows for i in node.all_input_nodes)

    def turn(self, param: str, axis: int, reads: bool) -> None:
        self.sides[param, axis] = Side(param, axis, reads)

    # ** norms **

    def norm(self, node: fx.Node) -> None:
        """A norm's gain goes into its readers; in front of a tied reader the stream turns back."""
        count = node.kwargs.get("count")
        if node.args[0] not in self.flows or count not in (None, self.group.units):
            raise Fixed("whole_axis", f"{node.name} norms a part of the channels", node)
        found = list(self.readers(node))
        tied = [c for c in found if isinstance(c[1], tuple)]
        if tied and len(tied) == len(found):
            self.back.append(node.name)
            self.plain |= {node, *self.moves(node), *(c for c, _, _ in found)}
            for call, _, _ in found:
                if call in self.flows:
                    raise Fixed("param_read_once", f"{call.name} has a tied weight", call)
            return
        readers = []
        for call, param, axis in found:
            if isinstance(param, tuple):
                raise Fixed(param[0], param[1], call)
            readers.append((call.name, param, axis, self.bias_of(call)))
        gain = self.stored(node, 1, "gain")
        bias = self.stored(node, 2, "bias") if op_name(node) == _NORMS[1] else None
        for reader, *_ in readers if bias is not None else ():
            if op_name(self.program.node(reader)) != LINEAR:
                raise Fixed("bias_folds", f"{reader} has no bias for that of {node.name}", node)
        offset = node.kwargs.get("offset", 0.0)
        assert isinstance(offset, (int, float))
        self.folds.append(Fold(node.name, gain, float(offset), bias, tuple(readers)))
        self.normed |= {node, *self.moves(node)}

    def stored(self, node: fx.Node, place: int, what: str) -> str | None:
        value = argument(node, place, what)
        param = self.program.param_of(value)
        if value is not None and param is None:
            raise Fixed("gain_folds", f"the {what} of {node.name} is computed", node)
        return None if param is None else param.name

    def bias_of(self, call: fx.Node) -> str | None:
        bias = argument(call, 2, "bias") if op_name(call) == LINEAR else None
        if bias is None:
            return None
        param = sole_param(self.program, bias, call)
        if isinstance(param, tuple):
            raise Fixed("bias_is_parameter", param[1], call)
        return param.name

    def moves(self, node: fx.Node) -> set[fx.Node]:
        """Values that are a norm's result, moved."""
        out, todo = set(), [node]
        for value in todo:
            for user in value.users:
                if user in self.flows and op_name(user) in _PARTS and user not in out:
                    out.add(user)
                    todo.append(user)
        return out

    def readers(
        self, node: fx.Node
    ) -> Iterator[tuple[fx.Node, str | tuple[str, str, str], int]]:  # fmt: skip
        """(call, its weight or why it is not its own, axis) of all that reads a norm."""
        for value in (node, *sorted(self.moves(node))):
            for user in value.users:
                name = op_name(user)
                if (name in _PARTS and user in self.flows) or name == "aten.sym_size.int":
                    continue
                if name not in (LINEAR, EXPERTS) or user.args[0] is not value:
                    why = f"{node.name} has a gain, and {user.name} ({name or user.op}) reads it"
                    raise Fixed("gain_folds", why, user)
                place, axis = (1, 1) if name == LINEAR else (3, 2)
                param = sole_param(self.program, user.args[place], user)
                yield user, param if isinstance(param, tuple) else param.name, axis

    # ** calls **

    def call(self, node: fx.Node) -> None:
        name = op_name(node)
        if name == _TABLE and node in self.flows:
            self.table(node)
        elif name in (LINEAR, EXPERTS):
            self.matrix(node, name)
        elif name in _SUMS:
            for operand in node.args[:2]:
                self.summand(node, operand)
        elif name in _FACTORS:
            self.factor(node)
        elif name in _PARTS and node in self.flows:
            pass
        elif name != "aten.sym_size.int":
            where = "is part of the model's interface" if not name else f"({name}) mixes channels"
            raise Fixed("turns", f"{node.name} {where}", node)

    def table(self, node: fx.Node) -> None:
        table = node.args[0]
        param = self.program.param_of(table)
        assert isinstance(table, fx.Node)
        if param is None or any(op_name(u) != _TABLE for u in table.users):
            # The head reads the same table, and does not turn.
            self.ahead.append(node.name)
        else:
            self.turn(param.name, 1, False)

    def matrix(self, node: fx.Node, name: str) -> None:
        places = ((1, 1), (1, 0)) if name == LINEAR else ((3, 2), (4, 1))
        sides = (node.args[0] in self.flows and node.args[0] not in self.plain, node in self.flows)
        for reads, (place, axis), there in zip((True, False), places, sides, strict=True):
            if not there:
                continue
            param = sole_param(self.program, node.args[place], node)
            if isinstance(param, tuple):
                raise Fixed(param[0], f"{node.name}: {param[1]}", node)
            self.turn(param.name, axis, reads)
        bias = self.bias_of(node) if sides[1] else None
        if bias is not None:
            self.turn(bias, 0, False)
        others = [a for a in node.args[1:] if isinstance(a, fx.Node) and a in self.flows]
        if others or not any(sides):
            raise Fixed("turns", f"{node.name} reads the channels as weights", node)

    def summand(self, node: fx.Node, operand: object) -> None:
        param = self.program.param_of(operand)
        if isinstance(operand, fx.Node) and operand in self.flows and operand not in self.normed:
            return
        if param is not None and param.shape[-1:] == (self.group.units,):
            found = sole_param(self.program, operand, node)
            if not isinstance(found, tuple):
                self.turn(param.name, len(param.shape) - 1, False)
                return
        raise Fixed("turns", f"{node.name} adds what does not turn with the channels", node)

    def factor(self, node: fx.Node) -> None:
        inside = [a for a in node.args if isinstance(a, fx.Node) and a in self.flows]
        others = [a for a in node.args if isinstance(a, fx.Node) and a not in self.flows]
        alike = all(not s or as_int(s[-1]) == 1 for s in map(shape_of, others) if s is not None)
        dividend = "div" not in op_name(node) or node.args[0] in self.flows
        if len(inside) != 1 or not alike or not dividend or node not in self.flows:
            why = f"{node.name} multiplies each channel by a number of its own"
            raise Fixed("turns", why, node)

    # ** the whole **

    def complete(self) -> None:
        """Every parameter of the group turns, or is a norm's own, or stays with its table."""
        norms = {f.node for f in self.folds} | set(self.back)
        for m in self.group.members:
            reader = self.program.node(m.node)
            users = self.program.param_node(m.param).users
            mine = (m.param, m.axis) in self.sides
            stays = {u.name for u in users} & (norms | set(self.ahead))
            if not mine and not stays:
                raise Fixed("turns", f"{m.param} has no way to turn with the channels", reader)

    def centre(self, touched: list[fx.Node]) -> None:
        """Without its mean the stream must look the same to everything but layer_norms."""
        for node in touched:
            name, x = op_name(node), node.args[0] if node.args else None
            looks = name == _NORMS[0] or (name in (LINEAR, EXPERTS) and x not in self.normed)
            if looks and x in self.flows and node not in self.plain:
                why = f"{node.name} sees the mean of the channels, which its norms do not"
                raise Fixed("mean_free", why, node)
