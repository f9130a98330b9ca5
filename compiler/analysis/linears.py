"""Linear sites: every matrix product with a stored weight, and what surrounds it.

Everything is derived from the data flow. Roles are for people to read; nothing decides by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ir.graph import Param, Program, info
from ..ir.refusal import Refusal
from .blocks import segments_of
from .flow import CHOOSE, EXPERTS, LINEAR, NONLINEAR, forward, is_cut, is_move
from .ties import ATTENTION, constants, op_name


@dataclass(frozen=True)
class LinearSite:
    """One ``aten.linear`` whose weight is a parameter that nothing else reads.

    One of the two weights of an experts call is a site too: ``slot`` 3 or 4, [E, out / E, in], the
    rows of all experts as one matrix. What its experts read is no value of the graph.

    Attributes:
        id: ``<segment>/linear<i>``, i in graph order within the segment; free of names.
        node, param, bias: names of the call, of its weight [out, in] and of its bias [out].
        reads: name of the value that it reads, [..., in].
        role: q, k, v, qkv, o, gate, up, gate_up, down, fc1, fc2, router, head or linear.
        group: id that linears reading one and the same value share.
        wave: sites of lower waves of the segment must be final before this one's input is.
        head: its result is the program's output.
        router: its result chooses experts.
        slot: which argument of the call the weight is; experts: matrices that it stacks.
    """

    id: str
    node: str
    param: str
    bias: str | None
    segment: str
    in_features: int
    out_features: int
    reads: str
    role: str
    group: str
    wave: int
    head: bool = False
    router: bool = False
    slot: int = 1
    experts: int = 1

    @property
    def stacked(self) -> bool:
        """Whether the weight stacks one matrix per expert."""
        return self.slot != 1


@dataclass(frozen=True)
class ExpertSite:
    """One ``llmc.experts`` call: per-expert weights ``gate_up`` [E, 2I, H] and ``down`` [E, H, I].

    ``reads``, ``index`` and ``weight`` name the tokens, the chosen experts and their weights.
    ``into`` and ``back`` are rows and columns of one expert's two weights, (2I, H) and (H, I), or
    less where they are cores between ``shared`` factors, whose names are in it.
    """

    id: str
    node: str
    gate_up: str
    down: str
    segment: str
    experts: int
    into: tuple[int, int]
    back: tuple[int, int]
    reads: str
    index: str
    weight: str
    wave: int
    shared: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "experts"

    @property
    def weights(self) -> tuple[LinearSite, LinearSite]:
        """Both weights as sites; what an expert reads is called ``<node>.<role>.<expert>``."""
        e = self.experts
        sizes = (("gate_up", self.gate_up, self.into), ("down", self.down, self.back))
        first, second = (
            LinearSite(
                f"{self.id}.{role}", self.node, param, None, self.segment, inputs, e * rows,
                f"{self.node}.{role}", role, f"{self.id}.{role}", self.wave + at,
                slot=3 + at, experts=e,
            )
            for at, (role, param, (rows, inputs)) in enumerate(sizes)
        )  # fmt: skip
        return first, second


@dataclass(frozen=True)
class _Place:
    id: str
    segment: str
    group: str
    wave: int


def linear_sites(program: Program) -> list[LinearSite | ExpertSite | Refusal]:
    """Sites and refusals, segment by segment in graph order.

    A weight that another node reads too (a tied head, a shared layer), or that is not a stored
    parameter (already compressed, or computed), is a refusal that names the culprit.
    """
    out: list[LinearSite | ExpertSite | Refusal] = []
    look = _Look(program)
    for segment in segments_of(program):
        waves: dict[fx.Node, int] = {}
        groups: dict[Any, int] = {}
        counts = {"linear": 0, "experts": 0}
        for node in (look.by_name[n] for n in segment.nodes):
            wave = max((waves.get(i, 0) for i in node.all_input_nodes), default=0)
            kind = {LINEAR: "linear", EXPERTS: "experts"}.get(op_name(node))
            waves[node] = wave
            if kind is None:
                continue
            group = groups.setdefault(node.args[0], len(groups))
            site_id = f"{segment.name}/{kind}{counts[kind]}"
            place = _Place(site_id, segment.name, f"{segment.name}/read{group}", wave)
            counts[kind] += 1
            found = look.linear(node, place) if kind == "linear" else look.experts(node, place)
            if not isinstance(found, Refusal):
                waves[node] = wave + (2 if isinstance(found, ExpertSite) else 1)
            out.append(found)
            out += look.inside(node) if kind == "experts" else []
    return out


def sole_param(program: Program, value: object, reader: fx.Node) -> Param | tuple[str, str, str]:
    """The parameter that only ``reader`` reads, else (predicate, reason, culprit)."""
    param = program.param_of(value)
    if param is None or not isinstance(value, fx.Node):
        what = value.name if isinstance(value, fx.Node) else repr(value)
        return "weight_is_parameter", f"{what} is not a stored parameter", reader.name
    others = [u for u in value.users if u is not reader]
    places = sum(a is value for a in reader.args)
    if others or places > 1:
        culprit = others[0] if others else reader
        kind = "embedding" if op_name(culprit) == "aten.embedding.default" else op_name(culprit)
        reason = f"tied with {kind}: {culprit.name} reads the same parameter"
        return "param_read_once", reason, culprit.name
    return param


class _Look:
    """One program's names, order and constants, looked up once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        nodes = list(program.graph.nodes)
        self.by_name = {n.name: n for n in nodes}
        self.rank = {n: i for i, n in enumerate(nodes)}
        self.fixed = constants(program.graph)

    def linear(self, node: fx.Node, place: _Place) -> LinearSite | Refusal:
        value, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        param = sole_param(self.program, weight, node)
        if isinstance(param, tuple):
            return self.refuse(node, *param)
        stored = self.program.param_of(bias)
        if bias is not None and stored is None:
            return self.refuse(
                node, "bias_is_parameter", f"its bias {bias} is not a stored parameter", node.name
            )
        assert isinstance(value, fx.Node)
        role, head, router = self.role(node, value)
        n, k = param.shape
        return LinearSite(
            place.id, node.name, param.name, stored.name if stored else None, place.segment, k, n,
            value.name, role, place.group, place.wave, head, router,
        )  # fmt: skip

    def experts(self, node: fx.Node, place: _Place) -> ExpertSite | Refusal:
        x, index, weight, gate_up, down = node.args[:5]
        found = []
        for value in (gate_up, down):
            param = sole_param(self.program, value, node)
            if isinstance(param, tuple):
                return self.refuse(node, *param)
            found.append(param)
        assert isinstance(x, fx.Node)
        assert isinstance(index, fx.Node)
        assert isinstance(weight, fx.Node)
        (e, *into), (_, *back) = (p.shape for p in found)
        shared = (a.name for a in node.args[5:7] if isinstance(a, fx.Node))
        return ExpertSite(
            place.id, node.name, found[0].name, found[1].name, place.segment, e,
            (into[0], into[1]), (back[0], back[1]), x.name, index.name, weight.name, place.wave,
            tuple(shared),
        )  # fmt: skip

    def inside(self, node: fx.Node) -> list[Refusal]:
        """What experts share between their two weights is no linear's."""
        why = "is read by all experts inside of their call, not by a linear"
        shared = (a for a in node.args[5:7] if isinstance(a, fx.Node))
        return [self.refuse(node, "weight_of_linear", f"{a.name} {why}", node.name) for a in shared]

    def refuse(self, node: fx.Node, predicate: str, reason: str, culprit: str) -> Refusal:
        path = info(self.by_name[culprit]).path
        return Refusal("linears", culprit, f"{node.name}: {reason}", predicate, path)

    def role(self, node: fx.Node, value: fx.Node) -> tuple[str, bool, bool]:
        """(role, is the head, is a router)."""
        seen: set[str] = set()
        for user, place in forward(node, self.rank, self.stops):
            name = op_name(user)
            if user.op == "output":
                seen.add("head")
            elif name in ATTENTION and place in (0, 1, 2):
                seen.add("qkv"[place])
            elif name == "llmc.gated":
                seen.add(("gate", "up")[place])
            elif (name == EXPERTS and place in (1, 2)) or name in CHOOSE - {EXPERTS}:
                seen.add("router" if name != EXPERTS else "chosen")
            elif name in NONLINEAR:
                seen.add("fc1")
        if "head" in seen:
            return "head", True, False
        if seen & {"chosen", "router"}:
            return "router", False, True
        if seen & set("qkv"):
            return "".join(c for c in "qkv" if c in seen), False, False
        if seen & {"gate", "up"}:
            return "_".join(c for c in ("gate", "up") if c in seen), False, False
        made_by = _makers(value)
        if made_by & ATTENTION:
            return "o", False, False
        if "llmc.gated" in made_by:
            return "down", False, False
        if made_by & NONLINEAR:
            return "fc2", False, False
        return ("fc1" if "fc1" in seen else "linear"), False, False

    def stops(self, user: fx.Node, reached: set[fx.Node]) -> bool:
        """Whether a reader ends a walk: a weight, attention, product, or the residual sum."""
        name = op_name(user)
        if name in ATTENTION or name in (LINEAR, EXPERTS, "llmc.gated") or user.op == "output":
            return True
        if name == "aten.add.Tensor":
            return any(v not in reached and v not in self.fixed for v in user.all_input_nodes)
        return False


def _makers(value: fx.Node) -> set[str]:
    """Ops that make a value, looking through moves, cuts and products."""
    found: set[str] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        name = op_name(node)
        if is_move(node) or is_cut(node):
            todo += node.all_input_nodes[:1]
        elif name == "aten.mul.Tensor":
            todo += node.all_input_nodes
        else:
            found.add(name)
    return found
