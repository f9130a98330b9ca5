"""Lifts of addmm, mm and matmul with a stored weight to ``linear``; weights end up as [out, in]."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...ir.dims import same
from ...ir.graph import Info, Param, Program, tensor_type
from ..sources import LeafWeights, transposed
from .matching import Either, Lift, Match, Tensor, Var, call, emit

_W = Tensor("w", 2)
_TURNED = call("transpose.int", _W, 0, 1, bind="turn", free=True)


def _weight(program: Program, found: Match) -> Any:
    """The weight as [out, in]: what was turned, or the parameter stored turned; else a reason."""
    w = found.bound["w"]
    if "turn" in found.bound:
        return w
    param = program.param_of(w)
    if param is None:
        return "expected a stored weight, found a computed one"
    return _turn_param(program, w, param)


def _turn_param(program: Program, node: fx.Node, param: Param) -> fx.Node | str:
    """The parameter's one node, from now on stored as [out, in]; bytes stay as they are."""
    weights = program.weights
    assert isinstance(weights, LeafWeights)
    if any(not _multiplies(user, node) for user in node.users):
        return f"{node.name} is read in another way too, so it cannot be stored turned"
    leaf = transposed(weights.leaves[param.name])
    weights.leaves[param.name] = leaf
    program.params[param.name] = Param(
        param.name, leaf.shape, param.dtype, param.names, param.trained, param.keep
    )
    node.meta["llmc"] = Info(program.param_type(program.params[param.name]))
    with program.graph.inserting_after(node):
        back = program.graph.call_function(_transpose(), (node, 0, 1))
    # Users not lifted yet read the turned-back weight, so the graph is right after each step.
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    first = node.meta["llmc"].type
    back.meta["llmc"] = Info(first.with_shape(*first.shape[::-1]), made_by="normalise.linear")
    return node


def _transpose() -> Any:
    from ...ir.ops import row

    return row("aten.transpose.int").target


def _multiplies(user: fx.Node, weight: fx.Node) -> bool:
    from ...ir.ops import row_of

    name = row_of(user).name if user.op == "call_function" else ""
    slot = {"aten.addmm.default": 2, "aten.mm.default": 1, "aten.matmul.default": 1}.get(name)
    return slot is not None and user.args[slot] is weight and user.args.count(weight) == 1


def _linear(program: Program, found: Match) -> fx.Node | str:
    x, bias = found.bound["x"], found.bound.get("bias")
    if bias is not None and tensor_type(bias).rank != 1:
        return f"expected a bias of rank 1, found {tensor_type(bias)}"
    core: Any = found.bound.get("core")
    if core is not None and {"beta", "alpha"} & set(core.kwargs):
        return "expected beta and alpha of 1"
    outer = tensor_type(found.root).shape[:-1]
    if "flat" in found.bound:
        inner = tensor_type(x).shape
        width = tensor_type(found.bound["flat"]).shape[-1]
        if not same(inner[-1], width) or len(inner) - 1 != len(outer):
            return f"expected a view of {tensor_type(x)} that keeps its last axis"
        if not all(same(a, b) for a, b in zip(inner, outer, strict=False)):
            return f"expected the axes of {tensor_type(x)} back, found {tensor_type(found.root)}"
        if not same(tensor_type(found.root).shape[-1], tensor_type(core).shape[-1]):
            return "expected a view that keeps the last axis"
    weight = _weight(program, found)
    if isinstance(weight, str):
        return weight
    args = (x, weight) if bias is None else (x, weight, bias)
    return emit(program, found, "linear", "aten.linear.default", *args)


_X, _B = Var("x"), Tensor("bias", 1)
_FLAT = call("reshape.default", _X, Var("to"), bind="flat", free=True)
_SIDES = Either((_TURNED, _W))


def _products(x: Any) -> Either:
    return Either(
        (
            call("addmm.default", _B, x, _SIDES, bind="core"),
            call("add.Tensor", call("mm.default|matmul.default", x, _SIDES, bind="core"), _B),
            call("mm.default|matmul.default", x, _SIDES, bind="core"),
        )
    )


# With the flattening views around them first, then bare.
LINEAR = Lift(
    "linear",
    (call("reshape.default", _products(_FLAT), Var("back")), _products(_X)),
    _linear,
    anchors=("aten.addmm.default", "aten.mm.default"),
)
