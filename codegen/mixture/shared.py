"""The expert that all tokens go to, read from the graph, and its weights as those of more experts.

    experts(h, .) [-> reshape] + [sigmoid(linear(h, g)) *] linear(gated(a, b), .)

It is cut into experts as wide as those that are chosen: into rows of gate and up, and columns of
down, whose products add up to its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import fx

from ...compiler.ir import packing
from ...compiler.ir.graph import tensor_type
from ..by_row import take_rows
from ..fuse_chain import calls_of, read_weight
from ..fuse_nodes import LINEAR, Unfit, argument, constant, is_op, is_sum, only_user
from ..problem import Parts, Problem
from .choice import read_choice

GATED, SIGMOID, MUL, SLICE = (
    "llmc.gated", "aten.sigmoid.default", "aten.mul.Tensor", "aten.slice.Tensor"
)  # fmt: skip
# Parts that can be cut by columns.
_CUT = {"codes", "scale", "zero", "meta", "values", "table"}


@dataclass(frozen=True, eq=False)
class Shared:
    """An expert that all tokens go to, as wide as ``count`` of those that are chosen.

    Attributes:
        sum: the call that adds it to the others. linears: its products. reads: what they read.
        ups: parts by role of gate and of up, or of one matrix of both. down: those of down.
        gate: a matrix [1, H]; the sigmoid of the product with it weighs the expert. nodes: all
            calls, those that make weights too.
    """

    count: int
    sum: fx.Node
    linears: tuple[fx.Node, ...]
    reads: frozenset[fx.Node]
    ups: tuple[Mapping[str, fx.Node], ...]
    down: Mapping[str, fx.Node]
    gate: fx.Node | None
    nodes: frozenset[fx.Node]

    def around(self, problem: Problem) -> Problem:
        """The problem of experts to which this one is added."""
        each = problem.N // problem.experts
        route = problem.route
        if self.gate is not None and (choice := read_choice(route)) and route:
            route = str(replace(choice, gated=True))
        return replace(
            problem, N=problem.N + self.count * each, experts=problem.experts + self.count,
            chosen=problem.chosen + self.count, always=self.count, route=route,
        )  # fmt: skip


def read_shared(y: fx.Node, up: Problem, down: Problem) -> Shared | None:
    """The expert that is added to ``y``, what experts of two problems give; None where none is.

    Raises:
        Unfit: it is no such expert as those, or somebody else reads what it makes.
    """
    add = only_user(y)
    if add is None or not is_sum(add):
        return None
    other = add.args[1] if add.args[0] is y else add.args[0]
    nodes: set[fx.Node] = {add}
    last, gate = _weighed(other, nodes)
    if not isinstance(last, fx.Node) or not is_op(last, LINEAR):
        return None
    joined = last.args[0]
    if not isinstance(joined, fx.Node) or not is_op(joined, GATED):
        return None
    linears = [last, *_halves(joined, nodes)]
    nodes |= {joined, *linears}
    if joined.kwargs.get("act") != up.act:
        raise odd(f"its activation is {joined.kwargs.get('act')}, theirs {up.act}")
    parts: list[dict[str, fx.Node]] = [{} for _ in linears]
    for linear, like, found in zip(linears, (down, up, up), parts, strict=False):
        _same(linear, like, found)
    width = int(str(tensor_type(joined).shape[-1]))
    if width % down.K or tensor_type(last).shape[-1] != down.outputs:
        raise odd(f"{width} channels wide, no multiple of the {down.K} of an expert")
    if down.group > 0 and down.columns % down.group and down.group % down.columns:
        raise odd(f"groups of {down.group} cannot be cut every {down.columns} columns")
    if unable := sorted(set(parts[0]) - _CUT):
        raise odd(f"its {unable[0]} cannot be cut by columns")
    products = [*linears, *([] if gate is None else [gate])]
    weights = [p.args[1] for p in products]
    nodes |= set(products).union(*(calls_of(w) for w in weights if isinstance(w, fx.Node)))
    for node in nodes - {add}:
        if strange := sorted(u.name for u in node.users if u not in nodes):
            raise odd(f"{node.name} is also read by {strange[0]}")
    reads = frozenset(p.args[0] for p in (*linears[1:], *products[len(linears) :]))
    matrix = None if gate is None else gate.args[1]
    assert matrix is None or isinstance(matrix, fx.Node)
    return Shared(
        width // down.K, add, tuple(products), reads,  # type: ignore[arg-type]
        tuple(parts[1:]), parts[0], matrix, frozenset(nodes),
    )  # fmt: skip


def odd(what: str) -> Unfit:
    """A refusal of such an expert."""
    return Unfit(f"the expert that all tokens go to stays apart: {what}", "shared")


def _weighed(node: object, nodes: set[fx.Node]) -> tuple[object, fx.Node | None]:
    """What a sigmoid of one product weighs, and that product; the node itself where none does."""
    if not is_op(node, MUL):
        return node, None
    assert isinstance(node, fx.Node)
    for gate, value in (node.args[:2], node.args[1::-1]):
        if not is_op(gate, SIGMOID):
            continue
        assert isinstance(gate, fx.Node)
        product = gate.args[0]
        if is_op(product, LINEAR) and tensor_type(product).shape[-1] == 1:  # type: ignore[arg-type]
            assert isinstance(product, fx.Node)
            if argument(product, 2, "bias") is not None or not constant(product.args[1]):
                raise odd("its weight has a bias or is computed from the inputs")
            nodes |= {node, gate}
            return value, product
    return node, None


def _halves(joined: fx.Node, nodes: set[fx.Node]) -> list[fx.Node]:
    """The products that a gate joins: gate and up, or the one of which they are halves."""
    gate, up = joined.args[:2]
    if is_op(gate, LINEAR) and is_op(up, LINEAR) and gate is not up:
        return [gate, up]  # type: ignore[list-item]
    if not (is_op(gate, SLICE) and is_op(up, SLICE)):
        raise odd("its gate is not of two products")
    assert isinstance(gate, fx.Node)
    assert isinstance(up, fx.Node)
    whole = gate.args[0]
    if whole is not up.args[0] or not is_op(whole, LINEAR) or gate.kwargs or up.kwargs:
        raise odd("its gate is not of two products")
    assert isinstance(whole, fx.Node)
    shape = tensor_type(whole).shape
    rows = int(str(shape[-1]))
    cuts = [(c.args[1], c.args[2], min(int(str(c.args[3])), rows), *c.args[4:]) for c in (gate, up)]
    last = cuts[0][0] if cuts[0][0] in (-1, len(shape) - 1) else None
    if cuts != [(last, 0, rows // 2), (last, rows // 2, rows)]:
        raise odd("its gate is not of the halves of a product")
    nodes |= {gate, up}
    return [whole]


def _same(linear: fx.Node, like: Problem, parts: dict[str, fx.Node]) -> None:
    """Unfit unless a product's weight is stored as those of the experts; fills ``parts``."""
    if argument(linear, 2, "bias") is not None:
        raise odd(f"{linear.name} has a bias")
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    if not constant(weight):
        raise odd("its weights are computed from the inputs")
    facts = read_weight(weight, parts)
    if any(len(part.users) != 1 for part in parts.values()):
        raise odd("its weights are read by others too")
    mine = replace(like, **{**facts, "N": like.N, "K": int(str(tensor_type(weight).shape[1]))})
    if not (mine.dense_group or like.dense_group):  # either has one scale for a row
        mine = replace(mine, group=like.group)
    mine = replace(mine, K=like.K, kept=like.kept)
    for name in ("weights", *(f.name for f in fields(Problem))):
        a, b = getattr(mine, name), getattr(like, name)
        if a != b:
            raise odd(f"its {name} is {a or 'none'}, theirs {b or 'none'}")
    if like.table and like.table != "row":
        raise odd("its levels are others than theirs")


# ** its weights as those of more experts **


def rows_of(problem: Problem, matrices: int) -> tuple[int, ...]:
    """Rows of each matrix of gate and up, or of down, of an expert that all tokens go to."""
    rows = problem.always * problem.N // problem.experts if problem.pairs else problem.outputs
    return (rows // matrices,) * matrices


def appended(problem: Problem, own: Parts, more: Parts) -> dict[str, torch.Tensor]:
    """Canonical parts of all experts, ``more`` being those of the one that is cut to be the last.

    own: of the experts that are chosen, below each other, and of what weighs the other ("gate").
    more: rows of gate, then of up; or down.
    """
    count, width = problem.always, problem.N // problem.experts // 2
    if problem.routed == "up":
        at = torch.arange(count)[:, None, None] * width + torch.arange(width)
        order = (at + torch.arange(2)[:, None] * count * width).flatten()
        cut = take_rows(replace(problem, N=len(order)), more, order)[1]
    else:
        cut = _columns_below(problem, more)
    out = {r: torch.cat([t, cut[r].to(t.dtype)]) if r in cut else t for r, t in own.items()}
    if "gate" in out:
        out["router"] = torch.cat([out["router"], out.pop("gate").to(out["router"].dtype)])
    return out


def _columns_below(problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """Parts of [N, count * K] as those of [count * N, K]: runs of columns below each other."""
    count, columns = problem.always, problem.columns
    bits = {"codes": problem.bits, "meta": packing.nm_bits(problem.m) if problem.m else 0}
    out = {}
    for role, t in parts.items():
        if role in bits:
            values = packing.unpack(t, bits[role], count * columns)
            out[role] = packing.pack(_below(values, count), bits[role])
        elif role == "table":
            out[role] = t.repeat(count, 1)
        elif role == "values":
            out[role] = _below(t, count)
        else:  # a scale for each group, or one for a row
            size = problem.group if t.shape[1] > 1 else count * columns
            first = torch.arange(count, device=t.device)[:, None] * columns
            groups = (first + torch.arange(problem.groups, device=t.device) * size) // size
            out[role] = _below(t[:, groups.flatten()], count)
    return out


def _below(t: torch.Tensor, count: int) -> torch.Tensor:
    return t.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1).contiguous()
