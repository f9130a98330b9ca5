"""Where a group is read: matrices x @ Wᵀ whose inputs are its units, and statistics of their x.

The down projections of stacked experts are read as one matrix [H, E·I] over the inputs
weight·act(gate x)·up x, which are zero where a token did not choose the expert. They are no value
of the graph, so their moments are taken beside the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.flow import EXPERTS, LINEAR
from ..analysis.groups import Group
from ..analysis.ties import op_name
from ..ir.events import Event, Listener, silent
from ..ir.graph import Param, Program
from ..ir.ops.semantic import gated
from .measure import Options, Walk, batches, collect
from .statistics import Collection

_ELEMENTS = 1 << 24
"""Elements of experts' inner values that are held at once."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One matrix that reads a group.

    Attributes:
        node: its call; param: its weight.
        value: name of the value x, and the key of its statistics.
        unit_of: int64 [n], the unit of each input.
        kind: ``linear``; ``into`` the experts (their gate and up rows together); ``inside`` them.
    """

    node: fx.Node
    param: Param
    value: str
    unit_of: Tensor
    kind: str

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight, or a tensor of its shape, as [m, n]."""
        if self.kind == "linear":
            return tensor
        return tensor.flatten(0, 1) if self.kind == "into" else tensor.movedim(1, 0).flatten(1)


def readings(program: Program, group: Group) -> list[Reading]:
    """Every matrix that reads the group, in the order of its members."""
    out = []
    for m in group.members:
        node = program.param_node(m.param)
        for user in node.users:
            found = _reading(program, user, node, m.axis, m.unit_of)
            if found is not None:
                out.append(found)
    return out


def _reading(
    program: Program, user: fx.Node, weight: fx.Node, axis: int, unit_of: Tensor
) -> Reading | None:  # fmt: skip
    param, x = program.params[str(weight.target)], user.args[0] if user.args else None
    if not isinstance(x, fx.Node):
        return None
    if op_name(user) == LINEAR and user.args[1] is weight and axis == 1:
        return Reading(user, param, x.name, unit_of, "linear")
    if op_name(user) != EXPERTS:
        return None
    if user.args[3] is weight and axis == 2:
        return Reading(user, param, x.name, unit_of, "into")
    if user.args[4] is weight and axis != 1:
        experts, _, inner = param.shape
        spread = unit_of.repeat(experts) if axis == 2 else unit_of.repeat_interleave(inner)
        return Reading(user, param, f"{user.name}.inner", spread, "inside")
    return None


def measured(
    program: Program, reads: Sequence[Reading], names: Sequence[str], tokens: Tensor,
    options: Options, listener: Listener = silent,
) -> Collection:  # fmt: skip
    """Statistics of what the readings read, dense propagation.

    Args:
        names: of statistics; the inside of experts has moments only.
    Raises:
        ModelError: an activation that is not finite.
    """
    outer = {r.value: list(names) for r in reads if r.kind != "inside"}
    inner = {r.node.name for r in reads if r.kind == "inside"}
    stats = collect(program, tokens, outer, options, listener) if outer else Collection()
    if inner:
        _inside(program, inner, stats, tokens, options, listener)
    return stats


def _inside(
    program: Program, names: set[str], stats: Collection, tokens: Tensor, options: Options,
    listener: Listener,
) -> None:  # fmt: skip
    """Add the moments of the inner values of experts."""
    walk = Walk(program, device=options.device)
    nodes = {program.node(n) for n in names}
    reads = {a for n in nodes for a in n.args[:4]}
    held: dict[Any, Tensor] = {}
    for name in names:
        stats.want(f"{name}.inner", "moments")

    def observe(node: fx.Node, value: object) -> None:
        if node in reads:
            assert isinstance(value, Tensor)
            held[node] = value
        if node in nodes:
            x, index, weight, both = (held[a] for a in node.args[:4])
            for part in _inner(x, index, weight, both, str(node.kwargs["act"])):
                stats.update(f"{node.name}.inner", part)

    last = max(i for i, s in enumerate(walk.segments) if names & set(s.nodes))
    with torch.no_grad():
        envs = batches(program, tokens, options)
        for segment in walk.segments[: last + 1]:
            listener(Event("tick", {"where": segment.name}))
            envs = walk.step(segment, envs, observe)
            held.clear()


def _inner(
    x: Tensor, index: Tensor, weight: Tensor, both: Tensor, act: str
) -> Iterator[Tensor]:  # fmt: skip
    """What the down projections read, weighted by the routing: [T, E·I], some tokens at a time.

    Args:
        x: [T, H]; index: int [T, k]; weight: [T, k]; both: [E, 2I, H], gate rows first.
    """
    experts, inner = both.shape[0], both.shape[1] // 2
    for at in torch.arange(len(x), device=x.device).split(max(1, _ELEMENTS // (experts * inner))):
        out = x.new_zeros(len(at), experts, inner)
        for e in range(experts):
            token, slot = torch.where(index[at] == e)
            if len(token):
                rows = torch.nn.functional.linear(x[at][token], both[e])
                value = gated(*rows.chunk(2, -1), act=act)
                out[token, e] += value * weight[at][token, slot, None].to(value.dtype)
        yield out.flatten(1)


def fitting(
    program: Program, groups: Iterable[Group], statistic: str, budget: int
) -> Iterator[list[Group]]:
    """Groups in parts whose statistics fit the budget together (one group always does)."""
    held: list[Group] = []
    values: dict[str, int] = {}
    for g in groups:
        mine = {}
        for r in readings(program, g):
            n = len(r.unit_of)
            mine[r.value] = 4 * n * n if statistic == "gram" else 16 * n
        new = {**values, **mine}
        if held and sum(new.values()) > budget:
            yield held
            held, new = [], mine
        held.append(g)
        values = new
    if held:
        yield held
