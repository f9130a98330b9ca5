"""The masked model: units of a group silenced instead of cut, which a cut must equal.

After each call that carries a group the entries of its removed units are zero, and where units
compete by value (softmax, top-k) they go in as -inf. Norms then see zeros and divide by the whole
length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.graph import Program
from ..ir.ops.base import row_of
from .flow import EXPERTS
from .groups import Group
from .ties import op_name, operands, ties_of

# (axis, element of a tuple) -> bool [literal length of the axis], True: stays.
Masks = dict[tuple[int, int], Tensor]


def masked(program: Program, keep: Mapping[Group, Tensor]) -> dict[str, Callable[..., Any]]:
    """Implementations by node name, for :func:`~llmc.compiler.ir.interpret.run`.

    Args:
        keep: of each group of the program, int64 units that stay.
    """
    masks: dict[str, Masks] = {}
    inside: dict[str, Masks] = {}
    rivals: set[str] = set()
    for group, units in keep.items():
        stays = _stays(group, units)
        for flow in group.values:
            _and(masks.setdefault(flow.node, {}), (flow.axis, flow.part), stays[flow.unit_of])
        for m in group.members:
            _and(inside.setdefault(m.param, {}), (m.axis, 0), stays[m.unit_of])
        rivals.update(group.chosen)
    out: dict[str, Callable[..., Any]] = {}
    for node in program.calls():
        mine = masks.get(node.name, {})
        given: dict[int, Masks] = {}
        if op_name(node) == EXPERTS:
            # Its neurons are no value of the graph: they are silenced in its parameters.
            params = {i: program.param_of(a) for i, a in enumerate(node.args)}
            given = {i: inside[p.name] for i, p in params.items() if p and p.name in inside}
        silent = _silent(node, masks) if node.name in rivals else {}
        if mine or given or silent:
            out[node.name] = _masked(row_of(node).reference, silent, given, mine)
    return out


def _and(into: Masks, key: tuple[int, int], mask: Tensor) -> None:
    into[key] = into[key] & mask if key in into else mask


def _stays(group: Group, units: Tensor) -> Tensor:
    """bool [units + 1]; the last entry answers index -1, which is left alone."""
    found = torch.zeros(group.units + 1, dtype=torch.bool)
    found[units] = True
    found[-1] = True
    return found


def _silent(node: fx.Node, masks: Mapping[str, Masks]) -> dict[int, Masks]:
    """Masks of the operands whose entries compete in this call, by argument."""
    given = operands(node)
    out: dict[int, Masks] = {}
    for tie in ties_of(node) or ():
        for a in tie.ins if tie.kind == "choose" else ():
            mask = masks.get(a.node.name, {}).get((a.axis, a.part))
            if mask is not None:
                out.setdefault(given.index((a.node, a.part)), {})[a.axis, 0] = mask
    return out


def _masked(
    reference: Callable[..., Any], silent: Mapping[int, Masks], zero: Mapping[int, Masks],
    masks: Masks,
) -> Callable[..., Any]:  # fmt: skip
    def call(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        for i, found in zero.items():
            given[i] = _fill(given[i], found, 0, 0)
        for i, found in silent.items():
            given[i] = _fill(given[i], found, 0, float("-inf"))
        value = reference(*given, **kwargs)
        if isinstance(value, (tuple, list)):
            return tuple(_fill(v, masks, part, 0) for part, v in enumerate(value))
        return _fill(value, masks, 0, 0)

    return call


def _fill(value: Tensor, masks: Masks, part: int, number: float) -> Tensor:
    for (axis, at), mask in masks.items():
        if at == part:
            # An axis of B·n entries repeats the n literal ones.
            whole = mask.repeat(value.shape[axis] // len(mask))
            shape = [-1 if a == axis else 1 for a in range(value.dim())]
            value = value.masked_fill(~whole.reshape(shape), number)
    return value
