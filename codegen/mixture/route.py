"""How a layer chooses its experts, read from the graph.

    linear(h, router) -> softmax -> topk -> [divided by their sum] -> experts(h, index, weight)

A softmax over the products that were chosen is the same as one over all of them, divided by the sum
of what was chosen. Anything else stays in the graph, and a kernel is told index and weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from ...compiler.ir.graph import info, tensor_type
from ...compiler.ir.ops import row_of
from ...compiler.ir.types import TensorType
from ..fuse_before import Before, is_norm, norm_refusal, read_before
from ..fuse_chain import calls_of
from ..fuse_nodes import LINEAR, Unfit, argument, constant, is_op

FLAT = ("aten.reshape.default", "aten.view.default")
CASTS = ("aten.to.dtype", "aten._to_copy.default")


@dataclass(frozen=True, eq=False)
class Route:
    """A router that a kernel can be.

    Attributes:
        kind: "softmax" or "softmax sum", as `Problem.route`. linear: the product with the router.
        nodes: all calls from there to index and weight.
    """

    kind: str
    linear: fx.Node
    nodes: frozenset[fx.Node]

    @property
    def router(self) -> fx.Node:
        weight = self.linear.args[1]
        assert isinstance(weight, fx.Node)
        return weight


def read_route(experts: fx.Node, count: int) -> Route:
    """The router of a call of experts, of which there are ``count``.

    Raises:
        Unfit: experts are chosen, or weighed, in another way.
    """
    h, index, weight = experts.args[:3]
    nodes: set[fx.Node] = set()
    weight = _uncast(weight, nodes)
    kind = "softmax"
    if is_op(weight, "aten.div.Tensor"):
        weight, kind = _undivided(weight, nodes), "softmax sum"
    elif is_op(weight, "aten.softmax.int"):
        weight, kind = _unsoftened(weight, nodes), "chosen"
    top = _of_topk(weight, 0, nodes)
    if _of_topk(_uncast(index, nodes), 1, nodes) is not top:
        raise Unfit("indices and weights of its experts are from different choices", "route")
    if top.args[2:] not in ((), (-1,), (1,), (-1, True), (-1, True, True)) or top.kwargs:
        raise Unfit(f"{top.name} takes others than the largest of each token", "route")
    given = _uncast(top.args[0], nodes)
    if kind == "chosen":
        kind = "softmax sum"
    elif is_op(given, "aten.softmax.int"):
        given = _unsoftened(given, nodes)
    else:
        raise Unfit(f"its experts are chosen by {_made(given)}, not by a softmax", "route")
    if not is_op(given, LINEAR) or given.args[0] is not h:
        raise Unfit(f"{_made(given)} stands between what experts read and their router", "route")
    _check_router(given, count)
    router = given.args[1]
    assert isinstance(router, fx.Node)
    nodes |= {given} | calls_of(router)
    for node in nodes:
        others = sorted(u.name for u in node.users if u not in nodes and u is not experts)
        if others:
            raise Unfit(f"{node.name} of its router is also read by {', '.join(others)}",
                        "one_reader")  # fmt: skip
    return Route(kind, given, frozenset(nodes))


def _check_router(linear: fx.Node, count: int) -> None:
    if argument(linear, 2, "bias") is not None:
        raise Unfit("its router has a bias", "route")
    if not constant(linear.args[1]):
        raise Unfit("its router is computed from the inputs", "stored")
    rows = tensor_type(linear).shape[-1]
    if rows != count:
        raise Unfit(f"its router chooses among {rows}, and there are {count} experts", "route")


def _made(node: object) -> str:
    return row_of(node).name if isinstance(node, fx.Node) and node.op != "get_attr" else "a value"


def _uncast(value: object, nodes: set[fx.Node]) -> fx.Node:
    """What casts between integers, or between floats, are made of."""
    assert isinstance(value, fx.Node)
    while value.op == "call_function" and row_of(value).name in CASTS:
        source = value.args[0]
        if not isinstance(source, fx.Node) or (isinstance(source, fx.Node) and (
            tensor_type(source).dtype.is_floating_point
            != tensor_type(value).dtype.is_floating_point
        )):  # fmt: skip
            break
        nodes.add(value)
        value = source
    return value


def _undivided(div: fx.Node, nodes: set[fx.Node]) -> fx.Node:
    """What is divided by the sum of itself over each token."""
    values, total = div.args[:2]
    if not isinstance(values, fx.Node) or not is_op(total, "aten.sum.dim_IntList"):
        raise Unfit("the weights of its experts are divided by something but their sum", "route")
    assert isinstance(total, fx.Node)
    given, dims, *rest = (*total.args, *total.kwargs.values())
    over = list(dims) if isinstance(dims, (list, tuple)) else []
    if given is not values or over not in ([-1], [1]) or not rest or rest[0] is not True:
        raise Unfit("the weights of its experts are divided by something but their sum", "route")
    nodes |= {div, total}
    return _uncast(values, nodes)


def _unsoftened(softmax: fx.Node, nodes: set[fx.Node]) -> fx.Node:
    if softmax.args[1] not in (-1, tensor_type(softmax).rank - 1):
        raise Unfit(f"{softmax.name} goes over axis {softmax.args[1]}, not over experts", "route")
    nodes.add(softmax)
    return _uncast(softmax.args[0], nodes)


def _of_topk(node: fx.Node, at: int, nodes: set[fx.Node]) -> fx.Node:
    what = ("weights", "indices")[at]
    if not is_op(node, "operator.getitem") or node.args[1] != at or not is_op(
        node.args[0], "aten.topk.default"
    ):  # fmt: skip
        raise Unfit(f"the {what} of its experts come from {_made(node)}, not from a topk", "route")
    top = node.args[0]
    assert isinstance(top, fx.Node)
    nodes |= {node, top}
    return top


# ** before and behind **


def read_norm(h: fx.Node, readers: set[fx.Node]) -> tuple[Before, frozenset[fx.Node]] | None:
    """The norm that made what experts and router read, with the calls that this takes in.

    readers: the calls that take it in. Linears beside them may read it too, as those of an expert
    that all tokens go to: their kernels make it once more. None where nothing of that kind made it.

    Raises:
        Unfit: somebody else reads it, or a kernel cannot make it.
    """
    flat = h if h.op == "call_function" and row_of(h).name in FLAT else None
    norm = h if flat is None else flat.args[0]
    if not isinstance(norm, fx.Node) or not is_norm(norm):
        return None
    if flat is not None:
        shape, whole = flat.args[1], tensor_type(norm).shape
        if not isinstance(shape, (list, tuple)) or list(shape) != [-1, whole[-1]]:
            return None
    for node, mine in ((h, readers), (norm, readers if flat is None else {flat})):
        others = sorted(u.name for u in node.users if u not in mine and not is_op(u, LINEAR))
        if others:
            raise Unfit(f"the norm is also read by {', '.join(others)}", "all_readers_fused")
    why = norm_refusal(norm)
    if why is not None:
        raise why
    return read_before(norm)[0], frozenset({norm} | ({flat} if flat is not None else set()))


def sizes_of(call: fx.Node, given: list[fx.Node]) -> Mapping[fx.Node, tuple[fx.Node, int]] | None:
    """By each size that a reshape is given, a tensor of ``given`` and its axis of that size."""
    out: dict[fx.Node, tuple[fx.Node, int]] = {}
    made = info(call).type
    assert isinstance(made, TensorType)
    shape = call.args[1]
    if not isinstance(shape, (list, tuple)):
        return None
    for size, dim in zip(shape, made.shape, strict=True):
        if not isinstance(size, fx.Node):
            continue
        places = [(t, a) for t in given for a, d in enumerate(tensor_type(t).shape) if d == dim]
        if not places:
            return None
        out[size] = places[0]
    return out
