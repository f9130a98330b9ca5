"""What is known without any input: tensors of one number, and small tables made of literals."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.dims import same, same_shape
from ...ir.graph import Param, Program, info, tensor_type
from ...ir.interpret import run_nodes
from ...ir.ops import row_of
from ...ir.types import TensorType
from ..sources import LeafWeights, constant

# A table of more entries than this stays computed.
_SMALL = 1 << 12
_FILLS = {
    "aten.zeros.default": 0.0, "aten.zeros_like.default": 0.0, "aten.new_zeros.default": 0.0,
    "aten.ones.default": 1.0, "aten.ones_like.default": 1.0, "aten.new_ones.default": 1.0,
}  # fmt: skip
_MOVES = {
    "aten.expand.default", "aten.unsqueeze.default", "aten.reshape.default", "aten.slice.Tensor",
    "aten.transpose.int", "aten.select.int",
}  # fmt: skip


def uniform(node: object) -> float | None:
    """The number that every entry of a value holds, whatever the inputs are; None if unknown."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    name = row_of(node).name
    if name in _FILLS:
        return _FILLS[name]
    if name in ("aten.full.default", "aten.full_like.default", "aten.new_full.default"):
        value = node.args[2 if "new" in name else 1]
        return float(value) if isinstance(value, (int, float)) else None
    if name in _MOVES:
        return uniform(node.args[0])
    if name == "aten.to.dtype":
        found = uniform(node.args[0])
        is_bool = tensor_type(node).dtype == torch.bool
        return float(found != 0) if found is not None and is_bool else found
    if name in ("aten.bitwise_not.default", "aten.logical_not.default"):
        found = uniform(node.args[0])
        is_bool = tensor_type(node).dtype == torch.bool
        return float(found == 0) if found is not None and is_bool else None
    if name == "aten.scatter.value":
        return _scattered(node)
    return None


def _scattered(node: fx.Node) -> float | None:
    """Along an axis of one entry the only index is 0: every entry is written."""
    x, axis, index, value = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(index, fx.Node)
    assert isinstance(axis, int)
    t = tensor_type(x)
    whole = same_shape(t.shape, tensor_type(index).shape) and same(t.shape[axis], 1)
    return float(value) if whole and isinstance(value, (int, float)) else None


def drop_idle_masks(program: Program) -> None:
    """A fill under a mask that is false everywhere is its operand (routers of one group)."""
    for node in list(program.calls("aten.masked_fill.Scalar")):
        x, mask = node.args[0], node.args[1]
        assert isinstance(x, fx.Node)
        if uniform(mask) == 0 and same_shape(tensor_type(x).shape, tensor_type(node).shape):
            node.replace_all_uses_with(x)
    program.prune()


def fold_tables(program: Program) -> None:
    """Floating tensors computed from literals alone become stored constants, e.g. alibi slopes."""
    weights = program.weights
    assert isinstance(weights, LeafWeights)
    known = {n for n in program.calls() if _is_table(n)}
    closed: set[fx.Node] = set()
    for node in program.calls():
        if node in known and all(i in closed for i in node.all_input_nodes):
            closed.add(node)
    for node in [n for n in program.calls() if n in closed]:
        t = tensor_type(node)
        if not t.rank or not t.dtype.is_floating_point or all(u in closed for u in node.users):
            continue
        before = [n for n in program.graph.nodes if n in closed]
        value = run_nodes(before, {}, program.fetch)[node]
        name = f"table_{node.name}"
        param = Param(name, tuple(value.shape), value.dtype, (name,), trained=False, keep=True)
        new = program.add_param(param, None, before=node, made_by="normalise.constants", like=node)
        weights.leaves[name] = constant(name, value)
        node.replace_all_uses_with(new)
        closed.discard(node)
    program.prune()


def _is_table(node: fx.Node) -> bool:
    """A call with a small literal shape."""
    t = info(node).type
    if not isinstance(t, TensorType) or row_of(node).stateful:
        return False
    sizes = [d for d in t.shape if isinstance(d, int)]
    return len(sizes) == t.rank and torch.Size(sizes).numel() <= _SMALL
