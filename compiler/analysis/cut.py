"""Cutting dependency groups out of a program: parameters, size literals, divisors and types.

Nothing is read: parameters are cut when they are loaded. What the op rows cannot refit is refused
with its node, before anything has been changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.build import result_type
from ..ir.dims import Dim, dim, divide, same
from ..ir.errors import ModelError, UsageError
from ..ir.graph import Param, Program, info
from ..ir.ops.base import infer, row_for
from ..ir.segments import refresh_segments
from ..ir.types import TensorType, ValueType
from ..ir.weights import CutWeights
from .groups import Group
from .spread import extent
from .ties import operands, ties_of

_BY = "cut"
Masks = dict[tuple[str, int, int], Tensor]


def cut(program: Program, keep: Mapping[Group, Tensor], made_by: str = _BY) -> list[str]:
    """Keep only some units of some groups; rewrites in place.

    Args:
        keep: of each group, int64 ascending units that stay. Groups are those of this program or of
            one that it is a clone of.
    Returns:
        Names of the parameters that got smaller, in graph order.
    Raises:
        UsageError: a group that is blocked, or too few units.
        ModelError: a call that cannot be fitted; the message names it. Nothing has been changed.
    """
    masks, params = _masks(keep)
    work = program.clone()
    _Cut(work, masks, params, made_by).run()
    program.graph, program.params, program.weights = work.graph, work.params, work.weights
    program.segments = work.segments
    return [str(n.target) for n in program.graph.nodes if n.op == "get_attr" and n.target in params]


def _scaled(size: Dim, mask: Tensor) -> Dim:
    """A length of which a cut leaves ``mask`` of the literal factor."""
    left = divide(size, extent(size))
    assert left is not None
    return dim(left * int(mask.sum()))


def _masks(keep: Mapping[Group, Tensor]) -> tuple[Masks, dict[str, dict[int, Tensor]]]:
    values: Masks = {}
    params: dict[str, dict[int, Tensor]] = {}
    for group, units in keep.items():
        if group.blocked:
            first = group.blocked[0]
            raise UsageError(
                f"expected a group that may be cut, found {group.id}: {first.reason}",
                where=f"node {first.node}",
            )
        inside = bool(len(units)) and int(units[0]) >= 0 and int(units[-1]) < group.units
        if not inside or not bool((units.diff() > 0).all()) or len(units) < group.least:
            raise UsageError(
                f"expected at least {group.least} of {group.units} units of {group.id}, ascending, "
                f"found {len(units)}"
            )
        if len(units) == group.units:
            continue
        stays = torch.zeros(group.units + 1, dtype=torch.bool)
        stays[units] = True
        stays[-1] = True  # index -1: left alone
        for v in group.values:
            key = (v.node, v.axis, v.part)
            values[key] = values.get(key, torch.tensor(True)) & stays[v.unit_of]
        for m in group.members:
            axes = params.setdefault(m.param, {})
            axes[m.axis] = axes.get(m.axis, torch.tensor(True)) & stays[m.unit_of]
    return values, params


class _Keep:
    """The masks around one call (see ``ir.ops.resize.Keep``)."""

    def __init__(self, node: fx.Node, masks: Mapping[fx.Node, dict[tuple[int, int], Tensor]]):
        self.node, self.masks, self.operands = node, masks, operands(node)

    def out(self, axis: int, part: int = 0) -> Tensor | None:
        return self.masks.get(self.node, {}).get((axis, part))

    def arg(self, index: int, axis: int) -> Tensor | None:
        found = self.operands[index] if index < len(self.operands) else None
        if not isinstance(found, tuple):
            return None
        return self.masks.get(found[0], {}).get((axis, found[1]))


class _Cut:
    def __init__(
        self, program: Program, masks: Masks, params: dict[str, dict[int, Tensor]], made_by: str
    ) -> None:
        self.program, self.params, self.made_by = program, params, made_by
        self.masks: dict[fx.Node, dict[tuple[int, int], Tensor]] = {}
        for (name, axis, part), mask in masks.items():
            self.masks.setdefault(program.node(name), {})[axis, part] = mask
        for name, axes in params.items():
            found = {(axis, 0): mask for axis, mask in axes.items()}
            self.masks[program.param_node(name)] = found

    def run(self) -> None:
        program = self.program
        changed: set[fx.Node] = set()
        for node in list(program.graph.nodes):
            if node.op == "get_attr" and node in self.masks:
                self._param(node)
                changed.add(node)
            elif node.op == "call_function":
                new = self._call(node, changed)
                if new is not None:
                    changed.add(new)
        out = program.output
        if any(n in changed for n in out.all_input_nodes):
            out.meta["llmc"] = replace(info(out), type=result_type(out.args[0]))
        kept = {
            name: {axis: mask.nonzero().squeeze(1) for axis, mask in axes.items()}
            for name, axes in self.params.items()
        }
        program.weights = CutWeights(program.weights, kept)
        refresh_segments(program)

    def _param(self, node: fx.Node) -> None:
        name = str(node.target)
        old = self.program.params[name]
        shape = list(old.shape)
        for axis, mask in self.params[name].items():
            shape[axis] = int(mask.sum())
        self.program.params[name] = new = replace(old, shape=tuple(shape))
        node.meta["llmc"] = replace(info(node), type=self.program.param_type(new))

    def _call(self, node: fx.Node, changed: set[fx.Node]) -> fx.Node | None:
        """Refit one call; the node whose type has changed, else None."""
        mine = self.masks.get(node, {})
        around = [self.masks.get(n, {}) for n in node.all_input_nodes]
        if not mine and not any(around) and not any(n in changed for n in node.all_input_nodes):
            return None
        counted = {t.outs[0].axis for t in ties_of(node) or () if t.kind == "source"}
        if mine and counted and all(axis in counted for axis, _ in mine):
            return self._select(node, mine)
        before = info(node).type
        row = row_for(node.target)
        try:
            if row is not None and row.resize is not None:
                args, kwargs = row.resize(_Keep(node, self.masks), node.args, dict(node.kwargs))
                node.args, node.kwargs = args, kwargs
            after = infer(node)
        except ModelError as e:
            raise ModelError(
                f"expected {node.target} to fit the cut, found: {e.message}",
                where=f"node {node.name} ({info(node).path})", hint=e.hint,
            ) from None  # fmt: skip
        self._check(node, before, after)
        node.meta["llmc"] = replace(info(node), type=after)
        return node

    def _select(self, node: fx.Node, mine: dict[tuple[int, int], Tensor]) -> fx.Node:
        """Select from a range that is counted along the cut axis."""
        program = self.program
        (((axis, _), mask),) = mine.items()
        index = mask.nonzero().squeeze(1)
        users = list(node.users)
        name = f"{node.name}_kept"
        param = Param(name, tuple(index.shape), torch.int64, trained=False, keep=True)
        behind = node.next
        which = program.add_param(param, index, before=behind, made_by=self.made_by, like=node)
        new = program.emit(
            "aten.index_select.default", node, axis, which, before=behind, made_by=self.made_by,
            like=node,
        )  # fmt: skip
        for user in users:
            user.replace_input_with(node, new)
        self.masks[new] = self.masks.pop(node)
        return new

    def _check(self, node: fx.Node, before: ValueType, after: ValueType) -> None:
        """Every axis has the size that the cut gives it, and every other axis its old one."""
        old, new = (v if isinstance(v, tuple) else (v,) for v in (before, after))
        for part, (a, b) in enumerate(zip(old, new, strict=True)):
            if not isinstance(a, TensorType) or not isinstance(b, TensorType):
                if a != b:
                    self._misfit(node, a, b)
                continue
            for axis, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)):
                mask = self.masks.get(node, {}).get((axis, part))
                want = x if mask is None else _scaled(x, mask)
                if not same(want, y):
                    self._misfit(node, want, y)

    def _misfit(self, node: fx.Node, want: Any, found: Any) -> None:
        raise ModelError(
            f"expected {node.target} to have size {want} after the cut, found {found}",
            where=f"node {node.name} ({info(node).path})",
        )
