"""Undoing a flattening of batch and sequence around token-wise ops, [B, S, H] -> [B·S, H]."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...ir.dims import numel, same, same_shape
from ...ir.graph import Program, tensor_type
from ...ir.ops import row_of
from .matching import position

# Ops that treat every token alike and leave the leading axes as they are.
_TOKEN_WISE = {
    "aten.linear.default", "llmc.layer_norm", "llmc.rms_norm", "llmc.activation", "llmc.gated",
    "aten.add.Tensor", "aten.mul.Tensor",
}  # fmt: skip


def unflatten_tokens(program: Program) -> None:
    """Rebuild each flattened region on the unflattened values, where nothing else reads it."""
    for back in list(program.calls("aten.reshape.default")):
        region = _region(back)
        if region is None:
            continue
        nodes, leaves = region
        made: dict[fx.Node, Any] = dict(leaves)
        for node in nodes:
            args = _with(node.args, made)
            kwargs = _with(node.kwargs, made)
            made[node] = program.emit(
                row_of(node).name,
                *args,
                before=back,
                made_by="normalise.tokens",
                like=node,
                **kwargs,
            )
        first = back.args[0]
        assert isinstance(first, fx.Node)
        back.replace_all_uses_with(made[first])
    program.prune()


def _with(value: Any, made: dict[fx.Node, Any]) -> Any:
    return fx.map_arg(value, lambda n: made.get(n, n))


def _region(back: fx.Node) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]] | None:
    """Token-wise nodes between flattening reshapes and ``back``, and what each reshape flattens."""
    shape = tensor_type(back).shape
    end = back.args[0]
    assert isinstance(end, fx.Node)
    if (
        len(shape) != 3
        or tensor_type(end).rank != 2
        or not same(shape[2], tensor_type(end).shape[1])
    ):
        return None
    flat = numel(shape[:2])
    inside: set[fx.Node] = set()
    leaves: dict[fx.Node, fx.Node] = {}
    todo = [end]
    while todo:
        node = todo.pop()
        if node in inside or node in leaves or node.op == "get_attr":
            continue
        t = tensor_type(node)
        if node.op != "call_function" or t.rank != 2 or not same(t.shape[0], flat):
            return None
        name = row_of(node).name
        if name == "aten.reshape.default":
            whole = node.args[0]
            assert isinstance(whole, fx.Node)
            if not same_shape(tensor_type(whole).shape, (*shape[:2], t.shape[1])):
                return None
            leaves[node] = whole
        elif name in _TOKEN_WISE:
            inside.add(node)
            todo += node.all_input_nodes
        else:
            return None
    if not inside or any(u not in inside and u is not back for n in inside for u in n.users):
        return None
    return sorted(inside, key=position), leaves
