"""Attention sites: whose rows and columns make each head, and which maps of heads are exact.

Which parameters hold a head is read off the dependency groups, with key and value heads parted from
the query heads that share them; which channel each row makes is read off labels (see
:mod:`.labels`). Where channels cannot be told apart, heads can still be pooled, but not turned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..ir.graph import Program, info
from ..ir.refusal import Refusal
from .blocks import segments_of
from .dimensions import Dimensions
from .flow import LINEAR
from .groups import Group, Member, scoped_group
from .labels import Trace, Untraced, leaks, reads, run_of, told_once, trace
from .linears import sole_param
from .ties import ATTENTION, as_int, op_name, shape_of, ties_of

_BY = "heads"


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one matrix that make heads, or its columns that read them.

    Attributes:
        node: the linear; param: its weight; bias: of its rows, else None.
        axis: 0 for rows, 1 for columns.
        index: int64 [heads, D], the row or column of each channel of each head.
        reads: the value that the linear reads.
    """

    node: str
    param: str
    bias: str | None
    axis: int
    index: Tensor
    reads: str


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """A norm between a projection and attention.

    ``index`` int64 [heads, D]: which entry of ``gain`` multiplies a channel, -1 where none does.
    ``offset`` is added to the gain; ``centred`` norms take the mean away, so nothing may turn.
    """

    node: str
    gain: str | None
    offset: float
    centred: bool
    index: Tensor


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One ``llmc.attention`` call whose key and value heads can be shared.

    Attributes:
        id: ``<segment>/attention<i>``, i in graph order within the segment.
        heads, kv: query heads, and key heads that are stored (each may be read repeated).
        keys, values: groups of the key and of the value heads without their query heads; one and
            the same group where a fused projection interleaves them with others.
        queries: group of the query heads: rows, columns behind, and whatever is told by head.
        k, v: rows of each key and value head. q, o: of each query head, where traced.
        interleaved: a fused projection lays q, k, v side by side in each head; it is laid out
            apart before anything is cut.
        fixed_keys, fixed_values, fixed_order: why keys and values may not be turned, or query heads
            not be put in another order; empty where they may.
        pairs: int64 [P, 2] channels of q and k that rotate together; free: channels that do not.
        norms: between the q and k projections and attention: (query side?, norm).
    """

    id: str
    node: str
    segment: str
    heads: int
    kv: int
    keys: Group
    values: Group
    queries: Group
    k: Rows
    v: Rows
    q: Rows | None
    o: Rows | None
    interleaved: bool
    fixed_keys: str
    fixed_values: str
    fixed_order: str
    pairs: Tensor
    free: Tensor
    norms: tuple[tuple[bool, HeadNorm], ...] = ()
    kind: str = field(default="attention", init=False)


def attention_sites(program: Program) -> list[AttentionSite | Refusal]:
    """Sites and refusals in graph order, one for each ``llmc.attention`` call."""
    look = _Look(program)
    out: list[AttentionSite | Refusal] = []
    for segment in segments_of(program):
        found = (program.node(n) for n in segment.nodes)
        for i, node in enumerate(n for n in found if op_name(n) == "llmc.attention"):
            try:
                out.append(look.site(node, f"{segment.name}/attention{i}", segment.name))
            except Untraced as no:
                path = info(no.node).path
                out.append(Refusal(_BY, no.node.name, str(no), no.predicate, path))
    return out


@dataclass
class _Traced:
    """What labels say about one operand of attention: its trace and rows by head, or why not."""

    trace: Trace | None = None
    rows: Rows | None = None
    why: str = ""


class _Look:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.dims = Dimensions(program)

    def site(self, node: fx.Node, name: str, segment: str) -> AttentionSite:
        """Raises Untraced where heads cannot be shared at all."""
        groups = [self.group(node, i) for i in range(3)]
        queries, keys, values = groups
        heads = as_int((shape_of(node.args[0]) or ())[1])
        if heads is None or heads % keys.units or keys.units != values.units:
            what = f"{keys.units} key and {values.units} value heads for {heads} query heads"
            raise Untraced("heads_known", f"{node.name} reads {what}", node)
        kv = keys.units
        q, k, v = (self.traced(node, i, kv if i else heads) for i in range(3))
        interleaved = any(_overlap(keys, g) for g in (queries, values)) or _overlap(queries, values)
        if interleaved:
            missing = next((t for t in (q, k, v) if t.rows is None), None)
            if missing is not None:
                why = f"a fused projection could not be told apart: {missing.why}"
                raise Untraced("layout_known", why, node)
            self.apart([q, k, v], node)
        else:
            for g, what in ((keys, "key"), (values, "value")):
                self.check(g, kv, node, what)
        k.rows = k.rows or self.rows(keys, node)
        v.rows = v.rows or self.rows(values, node)
        o, why_o = self.columns(node, heads)
        pairs, free, norms, fixed_keys = self.keys(node, q, k)
        return AttentionSite(
            name, node.name, segment, heads, kv, keys, values, queries, k.rows, v.rows, q.rows, o,
            interleaved, fixed_keys, self.fixed_values(node, v, why_o),
            "" if interleaved else self.fixed_order(node, queries, heads), pairs, free, norms,
        )  # fmt: skip

    def apart(self, parts: list[_Traced], node: fx.Node) -> None:
        """Whether a fused projection can be laid out as runs of heads of q, k and v."""
        made: dict[str, int] = {}
        for t in parts:
            assert t.trace is not None
            assert t.rows is not None
            run_of(t.trace, t.rows.index)
            other = leaks([t.trace], node, t.rows.index)
            if other is not None:
                why = f"{other.name} reads heads that {node.name} reads"
                raise Untraced("heads_read_once", why, other)
            made[t.rows.node] = made.get(t.rows.node, 0) + t.rows.index.numel()
        for name, count in made.items():
            linear = self.program.node(name)
            if (shape_of(linear) or ())[-1] != count:
                raise Untraced("layout_known", f"{name} makes more than heads", linear)

    # ** groups **

    def group(self, node: fx.Node, place: int) -> Group:
        value = node.args[place]
        assert isinstance(value, fx.Node)
        group = scoped_group(self.program, self.dims, self.dims.of(value, 1), ("repeat",), "heads")
        if group.blocked:
            first = group.blocked[0]
            culprit = self.program.node(first.node)
            raise Untraced("heads_kept", f"{value.name} has heads that {first.reason}", culprit)
        return group

    def check(self, group: Group, kv: int, node: fx.Node, what: str) -> None:
        """Whether the heads of a group can be pooled: alike, in matrices and norms, read once."""
        for m in group.members:
            reader = self.program.node(m.node)
            if m.role not in ("writes", "norm"):
                raise Untraced("heads_alike", f"{m.param} tells {what} heads apart", reader)
            found = sole_param(self.program, self.program.param_node(m.param), reader)
            if isinstance(found, tuple):
                raise Untraced(found[0], found[1], self.program.node(found[2]))
        if not _even([m.unit_of for m in group.members] + [v.unit_of for v in group.values], kv):
            raise Untraced("heads_alike", f"{node.name} reads {what} heads of several kinds", node)
        flows = {v.node for v in group.values}
        readers = {
            u.name
            for name in flows
            for u in self.program.node(name).users
            if op_name(u) in ATTENTION or u.op == "output"
        }
        if readers != {node.name}:
            other = min(readers - {node.name}, default=node.name)
            raise Untraced("heads_read_once", f"{other} reads the same {what} heads", node)

    def rows(self, group: Group, node: fx.Node) -> Rows:
        """Rows by head from the group alone: in stored order, so channels are only alike."""
        for m in group.members:
            reader = self.program.node(m.node)
            matrix = m.axis == 0 and len(self.program.params[m.param].shape) == 2
            if m.role == "writes" and matrix and op_name(reader) == LINEAR:
                return self.made(reader, units_of(m, group.units))
        raise Untraced("made_by_linear", f"{node.name} reads heads that no linear makes", node)

    def made(self, linear: fx.Node, index: Tensor) -> Rows:
        weight = sole_param(self.program, linear.args[1], linear)
        if isinstance(weight, tuple):
            raise Untraced(weight[0], weight[1], self.program.node(weight[2]))
        bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
        stored = None if bias is None else sole_param(self.program, bias, linear)
        if isinstance(stored, tuple):
            raise Untraced("bias_is_parameter", stored[1], self.program.node(stored[2]))
        value = linear.args[0]
        assert isinstance(value, fx.Node)
        name = None if stored is None else stored.name
        return Rows(linear.name, weight.name, name, 0, index, value.name)

    # ** channels **

    def traced(self, node: fx.Node, place: int, heads: int) -> _Traced:
        value = node.args[place]
        assert isinstance(value, fx.Node)
        try:
            found = trace(value)
            shown = found.end
            if len(shown) % heads:
                raise Untraced("heads_known", f"{value.name} lays {len(shown)} heads", value)
            runs = shown.reshape(heads, -1, shown.shape[1])
            if not torch.equal(runs, runs[:, :1].expand_as(runs)):
                raise Untraced("heads_known", f"{value.name} repeats heads in turns", value)
            index = runs[:, 0].contiguous()
            if len(index.unique()) != index.numel():
                raise Untraced("channels_kept", f"{value.name} holds a channel twice", value)
            return _Traced(found, self.made(found.source, index))
        except Untraced as no:
            return _Traced(why=str(no))

    def columns(self, node: fx.Node, heads: int) -> tuple[Rows | None, str]:
        """Columns behind attention by query head, else why not."""
        size = as_int((shape_of(node) or ())[3])
        try:
            if size is None:
                raise Untraced("channels_known", f"{node.name} has a symbolic width", node)
            linear, labels = reads(node)
            if not torch.equal(labels.sort().values, torch.arange(heads * size)):
                raise Untraced("one_reader", f"{linear.name} reads a part of it", linear)
            found = self.made(linear, labels.argsort().reshape(heads, size))
        except Untraced as no:
            return None, str(no)
        return Rows(found.node, found.param, None, 1, found.index, found.reads), ""

    def fixed_values(self, node: fx.Node, v: _Traced, why: str) -> str:
        if v.trace is None or v.rows is None or why:
            return v.why or why
        if v.trace.pairs or v.trace.norms:
            return "values are normalised or rotated on their way"
        return self.alone(node, [v], v.rows.index)

    def alone(self, node: fx.Node, parts: list[_Traced], index: Tensor) -> str:
        other = leaks([t.trace for t in parts if t.trace is not None], node, index)
        return f"{other.name} reads them too" if other is not None else ""

    def keys(
        self, node: fx.Node, q: _Traced, k: _Traced
    ) -> tuple[Tensor, Tensor, tuple[tuple[bool, HeadNorm], ...], str]:
        """(pairs, free channels, norms, why keys may not be turned)."""
        none = torch.empty(0, 2, dtype=torch.long), torch.empty(0, dtype=torch.long), ()
        if q.trace is None or k.trace is None or q.rows is None or k.rows is None:
            return *none, q.why or k.why
        for t in (q, k):
            why = self.alone(node, [t], t.rows.index)  # type: ignore[union-attr]
            if why:
                return *none, why
        mine, theirs = (_pairs(t.trace, t.rows.index) for t in (k, q))  # type: ignore[arg-type,union-attr]
        if isinstance(mine, str) or isinstance(theirs, str):
            return *none, mine if isinstance(mine, str) else str(theirs)
        if not torch.equal(mine, theirs):
            return *none, "queries and keys rotate other channels"
        for t in (q, k):
            for rope, _, _ in t.trace.pairs:  # type: ignore[union-attr]
                turned = bool(rope.kwargs.get("interleaved"))
                if not all(told_once(a, turned) for a in rope.args[1:3]):
                    return *none, f"{rope.name} is not proved to turn both channels of a pair alike"
        norms = tuple(
            (side is q, self.norm(call, seen, side.rows.index))  # type: ignore[union-attr]
            for side in (q, k)
            for call, seen in side.trace.norms  # type: ignore[union-attr]
        )
        if any(n.centred for _, n in norms):
            return *none, "a norm takes the mean of the channels away"
        size = k.rows.index.shape[1]
        rest = torch.ones(size, dtype=torch.bool)
        rest[mine.flatten()] = False
        return mine, rest.nonzero().flatten(), norms, ""

    def norm(self, node: fx.Node, seen: Tensor, index: Tensor) -> HeadNorm:
        gain = node.args[1] if len(node.args) > 1 else node.kwargs.get("gain")
        param = self.program.param_of(gain)
        at = torch.full((int(max(index.max(), seen.max())) + 1,), -1)
        at[seen.reshape(-1, seen.shape[-1])] = torch.arange(seen.shape[-1])
        centred = op_name(node) == "llmc.layer_norm" or (gain is not None and param is None)
        offset = node.kwargs.get("offset", 0.0)
        assert isinstance(offset, (int, float))
        name = None if param is None else param.name
        return HeadNorm(node.name, name, float(offset), centred, at[index])

    def fixed_order(self, node: fx.Node, queries: Group, heads: int) -> str:
        """Why query heads may not be put in another order."""
        parts = [m.unit_of for m in queries.members] + [v.unit_of for v in queries.values]
        if queries.units != heads or not _even(parts, heads):
            return "query heads are of several kinds"
        for m in queries.members:
            reader = self.program.node(m.node)
            if isinstance(
                sole_param(self.program, self.program.param_node(m.param), reader), tuple
            ):
                return f"{m.param} is read twice"
        for v in queries.values:
            for tie in ties_of(self.program.node(v.node)) or ():
                if tie.kind == "source" and tie.outs[0].axis == v.axis:
                    return f"{v.node} counts the heads"
        cores = {
            u.name
            for v in queries.values
            for u in self.program.node(v.node).users
            if op_name(u) in ATTENTION
        }
        return "" if cores == {node.name} else "other attention has the same query heads"


def _pairs(found: Trace, index: Tensor) -> Tensor | str:
    """Channels [P, 2] that a trace's rotations turn together, the same in all heads, else why."""
    channel = torch.full((int(index.max()) + 1,), -1)
    channel[index] = torch.arange(index.shape[1])
    both: list[Tensor] = []
    for rope, a, b in found.pairs:
        if max(int(a.max()), int(b.max())) >= len(channel):
            return f"{rope.name} turns channels that are not read"
        # A head that is read repeated turns once.
        once = torch.stack([a, b], 1).unique(dim=0)
        both.append(channel[once])
    if not both:
        return torch.empty(0, 2, dtype=torch.long)
    pairs, count = torch.cat(both).unique(dim=0, return_counts=True)
    apart = len(pairs.unique()) == pairs.numel() and int(pairs.min()) >= 0
    if not apart or not bool((count == len(index)).all()):
        return "heads rotate in different ways"
    return pairs


def _overlap(a: Group, b: Group) -> bool:
    """Whether two groups hold the same elements of a dimension."""
    both = set(a.classes) & set(b.classes)
    return any(bool(((a.classes[c] >= 0) & (b.classes[c] >= 0)).any()) for c in both)


def _even(parts: list[Tensor], units: int) -> bool:
    """Whether every part holds all units, each as often."""
    for unit_of in parts:
        count = torch.bincount(unit_of[unit_of >= 0], minlength=units)
        if not bool((count == count[0]).all()) or int(count[0]) == 0:
            return False
    return True


def units_of(member: Member, units: int) -> Tensor:
    """int64 [units, n]: the indices of each unit of a member, ascending."""
    order = torch.argsort(member.unit_of, stable=True)
    return order[int((member.unit_of < 0).sum()) :].reshape(units, -1)


def found_sites(program: Program) -> dict[str, AttentionSite]:
    """The sites alone, by id."""
    return {s.id: s for s in attention_sites(program) if isinstance(s, AttentionSite)}
