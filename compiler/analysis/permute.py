"""Reordering the units of dependency groups: every member moves, so the model stays the same.

Nothing is read: parameters are reordered when they are loaded. The graph itself does not change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ir.errors import UsageError
from ..ir.graph import Program
from ..ir.weights import CutWeights
from .dimensions import Block
from .groups import Group
from .ties import ties_of

KINDS = ("neuron", "hidden")
"""Groups whose units are alike: each is one channel, and nothing reads its place."""


def why_fixed(program: Program, group: Group) -> Block | None:
    """What keeps a group's units in their order: the culprit and the reason; None: nothing."""
    if group.blocked:
        return group.blocked[0]
    if group.kind not in KINDS:
        return Block(group.node, f"the place of a {group.kind.replace('_', ' ')} has a meaning")
    if group.chosen:
        return Block(group.chosen[0], "its index is what is chosen")
    ends = {n.name for n in (*program.inputs, *program.output.all_input_nodes)}
    for flow in group.values:
        if flow.node in ends:
            return Block(flow.node, "the order is part of the model's interface; it would have to "
                         "be undone online")  # fmt: skip
        ties = ties_of(program.node(flow.node)) or ()
        counted = {t.outs[0].axis for t in ties if t.kind == "source" and t.outs}
        if flow.axis in counted:
            return Block(flow.node, "it counts along the axis, so places have a meaning")
    return None


def moved(unit_of: Tensor, order: Tensor) -> Tensor:
    """The old index of each new one along an axis: unit u's place gets what ``order[u]`` had.

    unit_of: int64 [length], -1 stays. order: int64 [units], a permutation. Where a unit has several
    indices (gate and up in one matrix), the first goes to the first, and so on.
    """
    index = torch.arange(len(unit_of))
    at = (unit_of >= 0).nonzero().view(-1)
    units = unit_of[at]
    by_unit = torch.argsort(units, stable=True)
    count = len(at) // len(order)
    table = at[by_unit].view(len(order), count)
    index[table.reshape(-1)] = table[order].reshape(-1)
    return index


def permute(program: Program, orders: Mapping[Group, Tensor]) -> list[str]:
    """Reorder the units of groups in place.

    Args:
        orders: of each group, int64 [units], the old unit at each new place.
    Returns:
        Names of the parameters that are reordered, in graph order.
    Raises:
        UsageError: a group whose units have fixed places, or no permutation. Nothing was changed.
    """
    index: dict[str, dict[int, Tensor]] = {}
    for group, order in orders.items():
        fixed = why_fixed(program, group)
        if fixed is not None:
            raise UsageError(
                f"expected a group that may be reordered, found {group.id}: {fixed.reason}",
                where=f"node {fixed.node}",
            )
        if not torch.equal(order.sort().values, torch.arange(group.units)):
            raise UsageError(f"expected a permutation of {group.units} units of {group.id}")
        for m in group.members:
            axes = index.setdefault(m.param, {})
            new = moved(m.unit_of, order)
            axes[m.axis] = axes[m.axis][new] if m.axis in axes else new
    program.weights = CutWeights(program.weights, index)
    return [str(n.target) for n in program.graph.nodes if n.op == "get_attr" and n.target in index]
