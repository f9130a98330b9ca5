"""Tidying before and after the lifts: pieces as slices, equal calls once, canonical names."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import replace
from typing import Any, cast

from torch import fx

from ...ir.graph import Program, tensor_type
from ...ir.names import set_names
from ...ir.ops import row_of
from ..sources import LeafWeights

_SPLITS = (
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.chunk.default",
    "aten.unbind.int",
)


def pieces_to_slices(program: Program) -> None:
    """Each piece of a split, chunk or unbind becomes a slice (or select) of its own."""
    for node in list(program.calls()):
        if node.target is not operator.getitem:
            continue
        whole = node.args[0]
        if not isinstance(whole, fx.Node) or row_of(whole).name not in _SPLITS:
            continue
        x, index = whole.args[0], node.args[1]
        assert isinstance(x, fx.Node)
        assert isinstance(index, int)
        rank = tensor_type(x).rank
        name = row_of(whole).name
        axis = whole.args[-1] if len(whole.args) > (1 if name == "aten.unbind.int" else 2) else 0
        axis = int(cast(Any, whole.kwargs.get("dim", axis))) % rank
        if name == "aten.unbind.int":
            new = program.emit(
                "aten.select.int", x, axis, index, before=node, made_by="normalise.tidy", like=node
            )
        else:
            sizes = [t.shape[axis] for t in whole.meta["llmc"].type]
            if not all(isinstance(s, int) for s in sizes):
                continue
            start = sum(sizes[:index])
            new = program.emit(
                "aten.slice.Tensor", x, axis, start, start + sizes[index],
                before=node, made_by="normalise.tidy", like=node,
            )  # fmt: skip
        node.replace_all_uses_with(new)
    program.prune()


def share_equal_calls(program: Program) -> None:
    """Equal calls become one, placed right after its arguments, so that blocks stay alike."""
    seen: dict[Any, fx.Node] = {}
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    for node in list(program.calls()):
        if row_of(node).stateful:
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is node:
            continue
        node.replace_all_uses_with(first)
        last = max(first.all_input_nodes, key=lambda n: order[n], default=None)
        if last is not None and last.op != "get_attr":
            spot = _after_inputs(last)
            if spot is not first and order.get(spot, 0) < order[first]:
                spot.prepend(first)
                order[first] = order[last]
    program.prune()


def _after_inputs(node: fx.Node) -> fx.Node:
    """The node before which something that reads ``node`` may stand."""
    out = node.next
    while out.op == "placeholder":
        out = out.next
    return out


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ("seq", *(_frozen(v) for v in value))
    if isinstance(value, dict):
        return ("map", *sorted((k, _frozen(v)) for k, v in value.items()))
    return (type(value).__name__, value) if not isinstance(value, fx.Node) else value


def rename(program: Program) -> None:
    """Canonical names: inputs keep theirs, parameters p0, p1, … and calls by op, in order."""
    weights = program.weights
    assert isinstance(weights, LeafWeights)
    taken = {n.name for n in program.inputs} | {"output"}
    first_use: dict[str, None] = {}
    for node in program.graph.nodes:
        for used in node.all_input_nodes:
            if used.op == "get_attr":
                first_use.setdefault(str(used.target))
    new_name = {old: f"p{i}" for i, old in enumerate(first_use)}
    program.params = {new: replace(program.params[old], name=new) for old, new in new_name.items()}
    weights.leaves = {new: weights.leaves[old] for old, new in new_name.items()}
    counts: Counter[str] = Counter()
    names: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.target = names[node] = new_name[str(node.target)]
        elif node.op == "call_function":
            name = base = _base(node)
            while name in taken:
                counts[base] += 1
                name = f"{base}_{counts[base]}"
            taken.add(name)
            names[node] = name
    set_names(program.graph, names)


def _base(node: fx.Node) -> str:
    name = row_of(node).name
    return name.split(".")[1].strip("_")


def drop_marks(program: Program) -> None:
    """Remove the lifts' own bookkeeping from the nodes."""
    for node in program.graph.nodes:
        node.meta = {"llmc": node.meta["llmc"]}
