"""Groups of experts that alone are chosen from, read from the graph.

best = topk(view(w, [T, G, E/G]), 2).values.sum(-1)        or the largest of each group
mask = scatter(zeros_like(best), 1, topk(best, kept).indices, 1)
masked_fill(w, not (mask over the experts of each group), -inf)
"""

from __future__ import annotations

import math

from torch import fx

from ...compiler.ir.graph import tensor_type
from ..fuse_nodes import Unfit, argument, is_op

FLAT = ("aten.reshape.default", "aten.view.default")
CASTS = ("aten.to.dtype", "aten._to_copy.default")
NOT = ("aten.bitwise_not.default", "aten.logical_not.default")


def odd(what: str) -> Unfit:
    """A refusal of a route."""
    return Unfit(what, "route")


def one_of(node: object, ops: tuple[str, ...], nodes: set[fx.Node]) -> fx.Node | None:
    """What a call of one of these reads first, the call being put among ``nodes``."""
    if not isinstance(node, fx.Node) or not any(is_op(node, op) for op in ops):
        return None
    nodes.add(node)
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def of_topk(node: object, at: int, nodes: set[fx.Node]) -> fx.Node | None:
    """The choice of the largest along the last axis whose values (0) or places (1) a node is; None
    where it is none.

    Raises:
        Unfit: a topk of others than the largest, or along another axis.
    """
    if not is_op(node, "operator.getitem"):
        return None
    assert isinstance(node, fx.Node)
    top = node.args[0]
    if node.args[1] != at or not isinstance(top, fx.Node) or not is_op(top, "aten.topk.default"):
        return None
    how = [argument(top, i, n) for i, n in ((2, "dim"), (3, "largest"))]
    last = tensor_type(top.args[0]).rank - 1  # type: ignore[arg-type]
    if how[0] not in (None, -1, last) or how[1] not in (None, True):
        raise odd(f"{top.name} takes others than the largest of each token")
    nodes |= {node, top}
    return top


def read_groups(fill: fx.Node, nodes: set[fx.Node]) -> tuple[fx.Node, int, int, str, float]:
    """What a call that fills the experts of other groups reads, how many groups there are and how
    many are kept, what a group is chosen by ("max" or "two"), and with what it fills.

    Raises:
        Unfit: it fills others, or groups are chosen in another way.
    """
    given, mask, value = fill.args[:3]
    assert isinstance(given, fx.Node)
    nodes.add(fill)
    keep = one_of(mask, NOT, nodes)
    keep = one_of(keep, CASTS, nodes) or keep
    scattered = _spread(keep, nodes)
    zeros = one_of(scattered, ("aten.scatter.value",), nodes)
    best = one_of(zeros, ("aten.zeros_like.default",), nodes)
    if scattered is None or best is None or scattered.args[3] not in (1, 1.0, True):
        raise odd(f"{fill.name} leaves experts out in a way that no kernel knows")
    top = of_topk(scattered.args[2], 1, nodes)
    if top is None or top.args[0] is not best or scattered.args[1] not in (1, -1):
        raise odd("the groups of its experts are not those of the largest scores")
    view, by = _score(best, nodes)
    if one_of(view, FLAT, nodes) is not given:
        raise odd("the groups of its experts are scored by others than experts are chosen by")
    groups = tensor_type(best).shape[-1]
    kept, experts = tensor_type(scattered.args[2]).shape[-1], tensor_type(given).shape[-1]  # type: ignore[arg-type]
    if tensor_type(view).shape[-2:] != (groups, int(experts) // int(groups)):
        raise odd(f"its experts are put in groups as {tensor_type(view)}")
    if not isinstance(value, (int, float)) or not (value == -math.inf or value == 0):
        raise odd(f"experts of other groups are filled with {value}")
    return given, int(groups), int(kept), by, float(value)


def _spread(keep: fx.Node | None, nodes: set[fx.Node]) -> fx.Node | None:
    """What says of each group [T, G] what a value [T, E] says of its experts."""
    wide = one_of(keep, FLAT, nodes)
    thin = one_of(wide, ("aten.expand.default",), nodes)
    if thin is None or thin.args[1] not in (-1, 2):
        return None
    return one_of(thin, ("aten.unsqueeze.default",), nodes)


def _score(best: fx.Node, nodes: set[fx.Node]) -> tuple[fx.Node, str]:
    """The scores by groups [T, G, E/G] that those of groups are made of, and how."""
    two = one_of(best, ("aten.sum.dim_IntList",), nodes)
    if two is not None:
        top = of_topk(two, 0, nodes)
        if top is not None and top.args[1] == 2 and _over_last(best) and len(best.args) < 3:
            source = top.args[0]
            assert isinstance(source, fx.Node)
            return source, "two"
    most = one_of(best, ("aten.amax.default",), nodes)
    if most is not None and _over_last(best) and len(best.args) < 3:
        return most, "max"
    if is_op(best, "operator.getitem") and best.args[1] == 0:
        pair = one_of(best, ("operator.getitem",), nodes)
        source = one_of(pair, ("aten.max.dim",), nodes)
        if source is not None and pair is not None and pair.args[1:] in ((-1,), (2,)):
            return source, "max"
    raise odd("the groups of its experts are neither scored by their largest nor by their two")


def _over_last(call: fx.Node) -> bool:
    dims = argument(call, 1, "dim")
    return list(dims) in ([-1], [2]) if isinstance(dims, (list, tuple)) else dims in (-1, 2)
