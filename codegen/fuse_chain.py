"""Reading a linear: how its weight is stored and what stands beside it.

    linear(x, add_csr(expand_nm(dequantize(codes, …), meta), …), b) + linear(linear(x, B), A)

A chain that holds what no kernel could ever serve is an `Unfit` with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..compiler.ir.graph import Program, tensor_type
from ..compiler.ir.ops import row_of
from .fuse_before import grid_words
from .fuse_nodes import LINEAR, Unfit, argument, constant, is_op, is_sum, only_user
from .fuse_turned import turned
from .problem import Problem, dtype_name

# What only moves a stored tensor's values; whatever else makes a weight would decode it for good.
MOVES = frozenset({
    "aten.t.default", "aten.transpose.int", "aten.permute.default", "aten.slice.Tensor",
    "aten.contiguous.default", "aten.clone.default",
})  # fmt: skip


DENSE = "its weight is stored dense, not decoded from codes"


@dataclass(frozen=True, eq=False)
class Core:
    """A linear with its stored weight and what stands beside it.

    Attributes:
        linear: the call. result: the last call that it stands for. nodes: all of them.
        entry: the call whose first argument is what it reads.
        parts: by role of `problem.PARTS`, the node whose value that part is.
        problem: everything but the neighbours; of its input only the grid that it is on.
        rounding: the call that rounds its input, where the side path needs it inside.
    """

    linear: fx.Node
    result: fx.Node
    nodes: frozenset[fx.Node]
    entry: fx.Node
    parts: Mapping[str, fx.Node]
    problem: Problem
    rounding: fx.Node | None = None

    @property
    def reads(self) -> fx.Node:
        """What it reads as the graph stands now, before it is looked what made that."""
        x = self.entry.args[0]
        assert isinstance(x, fx.Node)
        return x

    @property
    def shared(self) -> fx.Node | None:
        """The weight, where others read it too: joined to another one it would be there twice."""
        values = self.parts.get("values")
        return None if values is None or len(values.users) == 1 else values


def calls_of(node: fx.Node) -> set[fx.Node]:
    """The calls that make a constant."""
    if node.op == "get_attr":
        return set()
    return {node}.union(*(calls_of(n) for n in node.all_input_nodes))


def _own(node: fx.Node, what: str) -> None:
    """Unfit unless a constant, and all that makes it, is read once: packing lets go of it."""
    if len(node.users) != 1:
        raise Unfit(f"{what} {node.name} is read {len(node.users)} times", "one_reader")
    if node.op != "get_attr":
        for n in node.all_input_nodes:
            _own(n, what)


# ** weights **


def read_core(program: Program, linear: fx.Node) -> list[Core]:
    """The linear with all that stands beside it, then with less and less of it.

    Raises:
        Unfit: the weight is stored in no form that a kernel could read.
    """
    parts: dict[str, fx.Node] = {}
    x, out = linear.args[0], tensor_type(linear)
    assert isinstance(x, fx.Node)
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    if not constant(weight):
        raise Unfit("its weight is computed from the inputs", "stored")
    facts = read_weight(weight, parts)
    bias = argument(linear, 2, "bias")
    if bias is not None:
        if not constant(bias):
            raise Unfit("its bias is computed from the inputs", "stored")
        parts["bias"] = bias
    problem = Problem(
        **facts, K=int(tensor_type(x).shape[-1]), x_dtype=dtype_name(out.dtype),
        bias=bias is not None, rounded=grid_words(x),
    )  # fmt: skip
    nodes = frozenset({linear} | calls_of(weight))
    core = Core(linear, linear, nodes, linear, parts, problem)
    found = [core]
    apart = _with_outliers(core)
    if apart is not None:
        found.insert(0, apart)
    found = [c for c in (_with_low_rank(found[0]),) if c is not None] + found
    return [c for c in map(turned, found) if c is not None] + found


def read_weight(node: fx.Node, parts: dict[str, fx.Node]) -> dict[str, Any]:
    """The facts of a stored weight [N, K]; fills ``parts``.

    Raises:
        Unfit: it is stored in no form that a kernel could read.
    """
    facts: dict[str, Any] = {}
    chain = []
    if is_op(node, "llmc.add_csr"):
        chain.append(node)
        for role, part in zip(("values", "index", "starts"), node.args[1:], strict=True):
            parts[f"csr_{role}"] = part  # type: ignore[assignment]
        facts["sparse"] = True
        node = node.args[0]  # type: ignore[assignment]
    if is_op(node, "llmc.expand_nm"):
        chain.append(node)
        facts |= {k: int(str(node.kwargs[k])) for k in ("n", "m")}
        node, parts["meta"] = node.args  # type: ignore[assignment]
    elif is_op(node, "llmc.expand_bitmap"):
        chain.append(node)
        facts |= {"bitmap": True, "N": int(tensor_type(node).shape[0])}
        node, parts["bitmap"] = node.args  # type: ignore[assignment]
        facts["kept"] = int(tensor_type(node).shape[0])
    for step in chain:
        if len(step.users) != 1:
            raise Unfit(f"the decoded weight {step.name} is read {len(step.users)} times",
                        "one_reader")  # fmt: skip
    facts |= _values(node, parts)
    for role, part in parts.items():
        if not constant(part):
            raise Unfit(f"{part} is computed from the inputs, not stored", "stored")
        # A dense weight stays what it is, so a head may be tied to the embedding, say.
        if role != "values" or part.op != "get_attr" or chain:
            _own(part, role)
    return facts


def _values(node: fx.Node, parts: dict[str, fx.Node]) -> dict[str, Any]:
    """Facts of a dense or kept matrix, decoded or stored as floats."""
    if is_op(node, "llmc.dequantize") or is_op(node, "llmc.lookup"):
        if len(node.users) != 1:
            raise Unfit(f"the decoded weight {node.name} is read {len(node.users)} times",
                        "one_reader")  # fmt: skip
        return _coded(node, parts)
    if is_op(node, "llmc.sum_signs"):
        return _signed(node, parts)
    if is_op(node, "llmc.decode_pairs"):
        return _paired(node, parts)
    if node.op != "get_attr" and not all(row_of(c).name in MOVES for c in calls_of(node)):
        raise Unfit(f"its weight is made by {row_of(node).name}, not decoded from codes", "decoded")
    parts["values"] = node
    rows = {"N": int(tensor_type(node).shape[0])} if tensor_type(node).rank == 2 else {}
    return {"weights": "dense", "bits": 16, "group": 0, "scale_dtype": ""} | rows


def _coded(node: fx.Node, parts: dict[str, fx.Node]) -> dict[str, Any]:
    table = is_op(node, "llmc.lookup")
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    kind = tensor_type(codes)
    if kind.rank != 2:
        raise Unfit(f"codes of rank {kind.rank}, not a matrix", "matrix")
    parts["codes"] = codes
    facts: dict[str, Any] = {
        "N": int(kind.shape[0]), "bits": int(str(node.kwargs["bits"])),
        "group": int(str(node.kwargs["group"])), "weights": "table" if table else "int",
        "scale_dtype": "",
    }  # fmt: skip
    scale = argument(node, 1, "scale")
    if scale is not None:
        parts["scale"] = scale
        facts["scale_dtype"] = dtype_name(tensor_type(scale).dtype)
    if table:
        levels = argument(node, 2, "table")
        facts["levels"] = str(node.kwargs.get("levels", ""))
        if levels is not None:
            parts["table"] = levels
            facts["table"] = "matrix" if tensor_type(levels).shape[0] == 1 else "row"
        return facts
    zero = argument(node, 2, "zero")
    if zero is not None:
        # Codes of zero points decode to whole numbers; with a step of their own they need not.
        if tensor_type(zero).dtype != torch.uint8 and not (
            is_op(zero, "llmc.decode_bilevel") and argument(zero, 1, "step") is None
        ):
            raise Unfit(f"zero points {zero.name} need not be whole numbers", "whole_zero")
        parts["zero"] = zero
    return facts | {"asym": zero is not None}


def _signed(node: fx.Node, parts: dict[str, fx.Node]) -> dict[str, Any]:
    if len(node.users) != 1:
        raise Unfit(f"the decoded weight {node.name} is read {len(node.users)} times", "one_reader")
    parts["signs"], parts["factors"] = node.args  # type: ignore[assignment]
    planes, rows = tensor_type(parts["signs"]).shape[:2]
    return {
        "N": int(rows), "bits": int(planes), "group": int(str(node.kwargs["group"])),
        "weights": "signs", "scale_dtype": dtype_name(tensor_type(parts["factors"]).dtype),
    }  # fmt: skip


def _paired(node: fx.Node, parts: dict[str, fx.Node]) -> dict[str, Any]:
    if len(node.users) != 1:
        raise Unfit(f"the decoded weight {node.name} is read {len(node.users)} times", "one_reader")
    parts["codes"], parts["scale"] = node.args  # type: ignore[assignment]
    return {
        "N": int(tensor_type(parts["codes"]).shape[0]), "weights": "paired",
        **{n: int(str(node.kwargs[n])) for n in ("bits", "group")},
        "scale_dtype": dtype_name(tensor_type(parts["scale"]).dtype),
    }  # fmt: skip


# ** beside the weight **


def _with_low_rank(core: Core) -> Core | None:
    """core + linear(linear(x, right), left) of the same input, or the latter two alone."""
    total = next(iter(core.result.users), None)
    if total is None or len(core.result.users) != 1 or not is_sum(total):
        return None
    part = total.args[1] if total.args[0] is core.result else total.args[0]
    found = _factors(part, core.reads)
    if not isinstance(part, fx.Node) or found is None or len(part.users) != 1:
        return None
    few, left, right = found
    if argument(part, 2, "bias") is not None:
        return None
    nodes = core.nodes | {total, part, few} | calls_of(left) | calls_of(right)
    problem = replace(core.problem, rank=int(tensor_type(left).shape[1]))
    parts = {**core.parts, "left": left, "right": right}
    return replace(core, result=total, nodes=nodes, parts=parts, problem=problem)


def _factors(part: object, x: fx.Node | None) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(few, left, right) of linear(few, left), few = linear(x, right), both factors its own."""
    if not isinstance(part, fx.Node) or not is_op(part, LINEAR):
        return None
    few = part.args[0]
    if not isinstance(few, fx.Node) or not is_op(few, LINEAR) or len(few.users) != 1:
        return None
    if argument(few, 2, "bias") is not None or (x is not None and few.args[0] is not x):
        return None
    left, right = part.args[1], few.args[1]
    if not (constant(left) and constant(right)):
        return None
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    try:
        _own(left, "left")
        _own(right, "right")
    except Unfit:
        return None
    return few, left, right


def read_factors(linear: fx.Node) -> Core | None:
    """A linear that is gone: linear(linear(x, right), left, bias), both stored as floats."""
    found = _factors(linear, None)
    if found is None:
        return None
    few, left, right = found
    if not left.op == right.op == "get_attr":
        return None
    x = few.args[0]
    assert isinstance(x, fx.Node)
    parts = {"left": left, "right": right}
    bias = argument(linear, 2, "bias")
    if bias is not None:
        if not constant(bias):
            return None
        parts["bias"] = bias
    rows, rank = tensor_type(left).shape
    problem = Problem(
        N=int(rows), K=int(tensor_type(right).shape[1]), bits=16, group=0, scale_dtype="",
        weights="factors", rank=int(rank), x_dtype=dtype_name(tensor_type(linear).dtype),
        bias=bias is not None, rounded=grid_words(x),
    )  # fmt: skip
    return Core(linear, linear, frozenset({linear, few}), few, parts, problem)


def read_coded_factors(linear: fx.Node) -> Core | None:
    """The same where both factors are codes on uniform grids of one scheme.

    Raises:
        Unfit: they are of two.
    """
    found = _factors(linear, None)
    if found is None or not all(is_op(factor, "llmc.dequantize") for factor in found[1:]):
        return None
    few, *factors = found
    x, parts, facts = few.args[0], dict[str, fx.Node](), []
    assert isinstance(x, fx.Node)
    for side, factor in zip(("left", "right"), factors, strict=True):
        own: dict[str, fx.Node] = {}
        facts.append(_coded(factor, own))
        parts |= {f"{side}_{role}": node for role, node in own.items()}
    left, right = facts
    K, rank = int(tensor_type(x).shape[-1]), right["N"]
    # A row whose columns all have one scale is of every grouping that has no second group of them.
    group = right["group"] if right["group"] < K else 0
    same = left["group"] == group or (left["group"] >= rank and (not group or rank <= group))
    wanted = ("bits", "asym", "scale_dtype")
    if not same or any(left[name] != right[name] for name in wanted):
        told = ["{bits} bits in groups of {group}, asym={asym}, scales in {scale_dtype}"] * 2
        first, second = (t.format(**f) for t, f in zip(told, facts, strict=True))
        raise Unfit(f"its factors are codes of two schemes: left has {first}; right has {second}",
                    "one_scheme")  # fmt: skip
    bias = argument(linear, 2, "bias")
    if bias is not None:
        if not constant(bias):
            return None
        parts["bias"] = bias
    problem = Problem(
        **right | {"N": left["N"], "weights": "factors", "group": group}, K=K, rank=rank,
        x_dtype=dtype_name(tensor_type(linear).dtype), bias=bias is not None,
        rounded=grid_words(x),
    )  # fmt: skip
    nodes = frozenset({linear, few}).union(*(calls_of(factor) for factor in factors))
    return Core(linear, linear, nodes, few, parts, problem)


def _with_outliers(core: Core) -> Core | None:
    """linear(round_input(x, …, columns), W) + linear(x[columns], apart)."""
    rounded = core.reads
    columns = argument(rounded, 2, "columns") if is_op(rounded, "llmc.round_input") else None
    total = next(iter(core.linear.users), None)
    if columns is None or total is None or len(core.linear.users) != 1 or not is_sum(total):
        return None
    part = total.args[1] if total.args[0] is core.linear else total.args[0]
    if not isinstance(part, fx.Node) or not is_op(part, LINEAR) or len(part.users) != 1:
        return None
    picked, apart = part.args[:2]
    given = (rounded.args[0], -1, columns)
    if not isinstance(picked, fx.Node) or not is_op(picked, "aten.index_select.default"):
        return None
    if picked.args != given or argument(part, 2, "bias") is not None:
        return None
    count = int(tensor_type(columns).shape[0])
    if not count or not isinstance(apart, fx.Node) or not constant(apart):
        return None
    if len(apart.users) != 1 or apart.op != "get_attr":
        return None
    return replace(
        core, result=total, nodes=core.nodes | {total, part, picked},
        parts={**core.parts, "columns": columns, "column_weights": apart},
        problem=replace(core.problem, outliers=count), rounding=rounded,
    )  # fmt: skip


def halves(core: Core) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """gated(y[: N/2], y[N/2 :]) of a linear's result y that nothing else reads, and the slices."""
    cuts = list(core.result.users)
    rows = core.problem.N
    if len(cuts) != 2 or rows % 2 or not all(is_op(c, "aten.slice.Tensor") for c in cuts):
        return None
    last = tensor_type(core.result).rank - 1
    wanted = [(last, 0, rows // 2), (last, rows // 2, rows)]
    found = sorted(cuts, key=lambda c: str(c.args[2:3]) != "(0,)")
    for cut, (axis, start, stop) in zip(found, wanted, strict=True):
        given = cut.args[1:4]
        if cut.kwargs or len(cut.args) != 4 or given[0] not in (axis, -1):
            return None
        if given[1] != start or min(int(str(given[2])), rows) != stop:
            return None
    gate = only_user(found[0])
    if gate is None or gate is not only_user(found[1]) or not is_op(gate, "llmc.gated"):
        return None
    return (gate, tuple(found)) if list(gate.args[:2]) == found else None
