"""What a mask expression allows: a rule read off the graph, or proved from index arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from ...ir.dims import SEQ, Dim, same_shape
from ...ir.graph import Program, info, tensor_type
from ...ir.interpret import run_nodes
from ...ir.ops import row_of
from ...ir.types import SymType, TensorType
from .views import constant_of

# Queries and keys of the attention that a mask is for.
Lengths: TypeAlias = tuple[Dim, Dim]


@dataclass(frozen=True)
class MaskRule:
    """Arguments of ``llmc.attention`` that say the same as a mask."""

    causal: bool
    window: int | None = None
    q_pos: fx.Node | None = None
    k_pos: fx.Node | None = None
    k_valid: fx.Node | None = None


# Index arithmetic: each entry of the result depends on its two indices through comparisons with
# literals only. Its pattern is therefore settled by a size beyond every literal (constant matrices
# are read whole, up to their own size).
_INDEX_OPS = {
    "aten.arange.default", "aten.arange.start", "aten.ones.default", "aten.zeros.default",
    "aten.full.default", "aten.new_ones.default", "aten.new_zeros.default",
    "aten.ones_like.default",
    "aten.tril.default", "aten.triu.default", "aten.eq.Scalar", "aten.ne.Scalar", "aten.eq.Tensor",
    "aten.le.Tensor", "aten.lt.Tensor", "aten.ge.Tensor", "aten.gt.Tensor", "aten.sub.Tensor",
    "aten.add.Tensor", "aten.le.Scalar", "aten.lt.Scalar", "aten.ge.Scalar", "aten.gt.Scalar",
    "aten.logical_not.default", "aten.bitwise_not.default", "aten.logical_and.default",
    "aten.bitwise_and.Tensor", "aten.__and__.Tensor", "aten.slice.Tensor", "aten.unsqueeze.default",
    "aten.reshape.default", "aten.expand.default", "aten.to.dtype", "aten.transpose.int",
    "aten.sym_size.int", "aten.masked_fill.Scalar", "aten.where.ScalarOther", "aten.where.Scalar",
    "aten.where.self",
}  # fmt: skip
_SIZES, _LAST = (1, 2, 3, 7), 40
_LITERAL = 16
# Added to a score, this leaves a weight of 0 in every floating dtype that models use.
_LOW = -1e4


def rule_of(
    program: Program, mask: fx.Node, lengths: Lengths, *, inverted: bool = False
) -> MaskRule | str:
    """The rule of a boolean mask (True = may read; ``inverted``: True = masked), or why none."""
    if mask.op == "call_function" and row_of(mask).name == "llmc.may_read" and not inverted:
        q, k, *valid = mask.args
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        given = valid[0] if valid else mask.kwargs.get("k_valid")
        assert given is None or isinstance(given, fx.Node)
        causal, window = mask.kwargs.get("causal", True), mask.kwargs.get("window")
        assert window is None or isinstance(window, int)
        return MaskRule(bool(causal), window, q, k, given)
    return _proved(program, mask, lengths, inverted)


def additive_rule(program: Program, mask: fx.Node, lengths: Lengths) -> MaskRule | str:
    """The rule of an additive mask: 0 where allowed, very low elsewhere; or why none."""
    if mask.op != "call_function":
        return f"expected a computed mask, found {mask.name}"
    name = row_of(mask).name
    if name in ("aten.where.ScalarOther", "aten.where.self", "aten.where.Scalar"):
        condition, yes, no = mask.args
        assert isinstance(condition, fx.Node)
        if _number(program, yes) == 0.0 and _is_low(_number(program, no)):
            return rule_of(program, condition, lengths)
        if _number(program, no) == 0.0 and _is_low(_number(program, yes)):
            return rule_of(program, condition, lengths, inverted=True)
    return _proved(program, mask, lengths, inverted=False)


def _number(program: Program, value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    known = constant_of(program, value)
    if known is not None and known.numel() == 1:
        return float(known)
    if isinstance(value, fx.Node) and value.op == "call_function":
        name = row_of(value).name
        if name == "aten.full.default" and isinstance(value.args[1], (int, float)):
            return float(value.args[1])
        if name in ("aten.zeros.default", "aten.new_zeros.default"):
            return 0.0
    return None


def _is_low(value: float | None) -> bool:
    return value is not None and value <= _LOW


def _proved(program: Program, mask: fx.Node, lengths: Lengths, inverted: bool) -> MaskRule | str:
    """Evaluate index arithmetic at several sizes: a causal band, or nothing masked."""
    if not isinstance(info(mask).type, TensorType) or tensor_type(mask).rank < 2:
        return "expected a mask [S, S]"
    if not same_shape(tensor_type(mask).shape[-2:], lengths):
        # A size of 1 would be spread over all keys, which is another mask.
        return f"expected one mask [S, S], found {tensor_type(mask)}"
    fixed = tensor_type(mask).shape[-1]
    nodes = _ancestors(program, mask, literals=not isinstance(fixed, int))
    if isinstance(nodes, str):
        return nodes
    sides = [min(t.shape[-2:]) for t in _matrices(program, nodes)]
    last = fixed if isinstance(fixed, int) else min([_LAST, *sides])
    smaller = () if isinstance(fixed, int) else (n for n in _SIZES if n < last)
    width, causal, both = last, True, True
    for size in (*smaller, last):
        value = _evaluate(program, nodes, mask, size)
        if value is None:
            return "expected a mask that can be evaluated"
        allowed = value == 0 if value.is_floating_point() else value.bool()
        if value.is_floating_point() and not bool((value[~allowed] <= _LOW).all()):
            return "expected 0 or very low values in the mask"
        allowed = ~allowed if inverted else allowed
        if allowed.ndim < 2 or allowed.shape[-2:] != (size, size):
            return f"expected one mask [S, S], found {tuple(allowed.shape)}"
        copies = allowed.reshape(-1, size, size)
        band = copies[0]
        if not bool((copies == band).all()):
            return f"expected one mask [S, S], found several in {tuple(allowed.shape)}"
        width = int(band[-1].sum())
        back = torch.arange(size)[:, None] - torch.arange(size)[None]
        causal = causal and torch.equal(band, (back >= 0) & (back < width))
        both = both and bool(band.all())
        if not causal and not both:
            return "expected a causal band, found another mask"
    if both and last > 1:
        return MaskRule(False)
    return MaskRule(True, None if width == last else width)


def _matrices(program: Program, nodes: list[fx.Node]) -> list[torch.Tensor]:
    """Constant matrices among the nodes; their pattern holds up to their own size only."""
    found = [constant_of(program, n) for n in nodes if n.op == "get_attr"]
    return [t for t in found if t is not None and t.ndim >= 2]


def _ancestors(program: Program, mask: fx.Node, *, literals: bool) -> list[fx.Node] | str:
    needed, todo = {mask}, [mask]
    while todo:
        node = todo.pop()
        if node.op == "get_attr":
            if constant_of(program, node) is None:
                return f"expected a constant, found the parameter {node.name}"
            continue
        if node.op != "call_function" or row_of(node).name not in _INDEX_OPS:
            return f"expected index arithmetic, found {node.name}"
        if isinstance(info(node).type, SymType):
            continue
        found: list[int] = []
        _collect(node.args, found)
        free = row_of(node).name == "aten.slice.Tensor" or not literals
        if not free and any(abs(v) > _LITERAL for v in found):
            return f"expected literals up to {_LITERAL}, found {max(found, key=abs)}"
        for used in node.all_input_nodes:
            if used not in needed:
                needed.add(used)
                todo.append(used)
    return [n for n in program.graph.nodes if n in needed]


def _collect(value: Any, into: list[int]) -> None:
    if isinstance(value, (list, tuple)):
        for v in value:
            _collect(v, into)
    elif isinstance(value, int) and not isinstance(value, bool):
        into.append(value)


def _evaluate(
    program: Program, nodes: list[fx.Node], mask: fx.Node, size: int
) -> torch.Tensor | None:
    env: dict[fx.Node, Any] = {}
    todo = []
    for node in nodes:
        t = info(node).type
        if isinstance(t, SymType):
            env[node] = size if t.expr == SEQ else 2
        elif isinstance(t, TensorType):
            todo.append(node)
    try:
        run_nodes(todo, env, program.fetch)
    except (RuntimeError, IndexError):
        return None
    out: torch.Tensor = env[mask]
    return out
