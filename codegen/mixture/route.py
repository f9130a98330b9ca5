"""How a layer chooses its experts, read from the graph.

    linear(h, router) -> softmax -> topk -> [divided by their sum] -> experts(h, index, weight)
    linear(h, router) -> sigmoid = s -> [s + correction] -> [of the best groups] -> topk = index
    gather(s, index) -> [/ (sum + eps)] -> [* factor] -> experts(h, index, .)

A softmax over the products that were chosen is the same as one over all of them, divided by the sum
of what was chosen. Anything else stays in the graph, and a kernel is told index and weight.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...compiler.ir.graph import info, tensor_type
from ...compiler.ir.ops import row_of
from ...compiler.ir.types import TensorType
from ..fuse_before import Before, is_norm, norm_refusal, read_before
from ..fuse_chain import calls_of
from ..fuse_nodes import LINEAR, Unfit, argument, constant, is_op, is_sum
from .choice import Choice, unfit
from .groups import CASTS, FLAT, odd, of_topk, read_groups


@dataclass(frozen=True, eq=False)
class Route:
    """A router that a kernel can be.

    Attributes:
        kind: as `Problem.route`. linear: the product with the router. router: that, as it is kept.
            correction: what is added to scores for the choice. nodes: all calls from there to index
            and weight.
    """

    kind: str
    linear: fx.Node
    router: fx.Node
    nodes: frozenset[fx.Node]
    correction: fx.Node | None = None

    @property
    def parts(self) -> dict[str, fx.Node]:
        """By role, the node whose value that part is."""
        found = {"router": self.router}
        return found if self.correction is None else found | {"correction": self.correction}


def read_route(experts: fx.Node, count: int) -> Route:
    """The router of a call of experts, of which there are ``count``.

    Raises:
        Unfit: experts are chosen, or weighed, in another way.
    """
    h, index, weight = experts.args[:3]
    nodes: set[fx.Node] = set()
    weight, how = _weighed(_uncast(weight, nodes), nodes)
    index = _uncast(index, nodes)
    softened = is_op(weight, "aten.softmax.int")
    if softened:
        weight = _unsoftened(weight, nodes)
    scores = None if softened else _gathered(weight, index, nodes)
    top = of_topk(index, 1, nodes)
    if top is None:
        raise odd(f"the indices of its experts come from {_made(index)}, not from a topk")
    if scores is None and (mine := of_topk(weight, 0, nodes)) is not top:
        if mine is None:
            raise odd(f"the weights of its experts come from {_made(weight)}, not from a topk")
        raise odd("indices and weights of its experts are from different choices")
    wanted = _uncast(top.args[0], nodes)
    filled = None
    if is_op(wanted, "aten.masked_fill.Scalar"):
        wanted, how["groups"], how["kept"], how["by"], filled = read_groups(wanted, nodes)
    correction = _correction(wanted, count)
    if correction is not None:
        nodes |= {wanted} | calls_of(correction)
        wanted = next(a for a in wanted.args if a is not correction)  # type: ignore[assignment]
        how["added"] = True
    if (wanted if scores is None else scores) is not wanted or (scores is None and correction):
        raise odd("its experts are weighed by other scores than they are chosen by")
    if filled == 0 and correction is not None:
        raise odd("experts of other groups are filled with 0, which scores may lie below")
    if softened:
        if set(how) - {"times"}:
            raise odd("the weights of its experts are a softmax, and not of all that chooses them")
        given, how["score"], how["sum"] = wanted, "softmax", True
    else:
        given, how["score"] = _scored(wanted, nodes)
    linear = _product(given, h, count, nodes)
    router, how["wide"] = _router(linear, h)  # type: ignore[arg-type]
    nodes |= {linear} | calls_of(linear.args[1])  # type: ignore[arg-type]
    chosen = int(tensor_type(index).shape[-1])
    choice = Choice(**how)
    if expected := unfit(choice, count, chosen):
        raise odd(f"its groups of experts are not {expected}")
    for node in nodes:
        others = sorted(u.name for u in node.users if u not in nodes and u is not experts)
        if others:
            raise Unfit(f"{node.name} of its router is also read by {', '.join(others)}",
                        "one_reader")  # fmt: skip
    return Route(str(choice), linear, router, frozenset(nodes), correction)


def _product(linear: fx.Node, h: object, count: int, nodes: set[fx.Node]) -> fx.Node:
    """The product with the router that scores are made of."""
    if not is_op(linear, LINEAR) or (
        linear.args[0] is not h and _uncast(linear.args[0], nodes) is not h
    ):
        raise odd(f"{_made(linear)} stands between what experts read and their router")
    if argument(linear, 2, "bias") is not None:
        raise odd("its router has a bias")
    if not constant(linear.args[1]):
        raise Unfit("its router is computed from the inputs", "stored")
    rows = tensor_type(linear).shape[-1]
    if rows != count:
        raise odd(f"its router chooses among {rows}, and there are {count} experts")
    return linear


def _router(linear: fx.Node, h: fx.Node) -> tuple[fx.Node, bool]:
    """The router as kernels keep it, and whether that is wider than what experts read: products of
    numbers of 16 bits are the same in fp32, but for those of a router that was kept in fp32."""
    made = linear.args[1]
    assert isinstance(made, fx.Node)
    stored = _uncast(made, set())
    like, wide = tensor_type(h).dtype, tensor_type(linear).dtype
    if wide == torch.float32 and like in (torch.float16, torch.bfloat16):
        near = tensor_type(stored).dtype == like
        return (stored, False) if near else (made, True)
    return made, False


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


# ** weights **


def _weighed(weight: fx.Node, nodes: set[fx.Node]) -> tuple[fx.Node, dict[str, Any]]:
    """What is multiplied by a number and divided by its sum over a token to be weights, and how."""
    how: dict[str, Any] = {}
    if is_op(weight, "aten.mul.Tensor") and _number(weight.args[1]):
        nodes.add(weight)
        how["times"] = float(weight.args[1])  # type: ignore[arg-type]
        weight = _uncast(weight.args[0], nodes)
    if is_op(weight, "aten.div.Tensor"):
        values, total = weight.args[:2]
        how |= _total(values, total, nodes)
        nodes.add(weight)
        weight = _uncast(values, nodes)
    return weight, how


def _total(values: object, total: object, nodes: set[fx.Node]) -> dict[str, Any]:
    """How weights are divided by their sum: what is added to it, or the least that it is."""
    how: dict[str, Any] = {"sum": True}
    for word, ops in _BEHIND.items():
        if isinstance(total, fx.Node) and any(is_op(total, op) for op in ops):
            number = argument(total, 1, "min")
            more = bool(total.args[2:]) or bool(set(total.kwargs) - {"min"})
            if more or not _number(number) or number <= 0:
                raise odd("the weights of its experts are divided by something but their sum")
            nodes.add(total)
            how[word], total = float(number), total.args[0]
            break
    if not isinstance(values, fx.Node) or not is_op(total, "aten.sum.dim_IntList"):
        raise odd("the weights of its experts are divided by something but their sum")
    assert isinstance(total, fx.Node)
    given, dims, *rest = (*total.args, *total.kwargs.values())
    over = list(dims) if isinstance(dims, (list, tuple)) else []
    if given is not values or over not in ([-1], [1]) or not rest or rest[0] is not True:
        raise odd("the weights of its experts are divided by something but their sum")
    nodes.add(total)
    return how


# What may be done to a sum before it divides, by the field of a choice.
_BEHIND = {
    "least": ("aten.clamp.default", "aten.clamp_min.default"), "eps": ("aten.add.Tensor",),
}  # fmt: skip


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _gathered(weight: fx.Node, index: fx.Node, nodes: set[fx.Node]) -> fx.Node | None:
    """The scores [T, E] that weights are taken from at ``index``; None where they are not."""
    if not is_op(weight, "aten.gather.default"):
        return None
    if weight.args[1] not in (-1, 1) or _uncast(weight.args[2], nodes) is not index:
        raise odd("indices and weights of its experts are from different choices")
    nodes.add(weight)
    return _uncast(weight.args[0], nodes)


# ** scores **


def _correction(wanted: fx.Node, count: int) -> fx.Node | None:
    """What is stored and added to scores [T, E] for the choice."""
    if not is_sum(wanted):
        return None
    stored = [a for a in wanted.args if isinstance(a, fx.Node) and constant(a)]
    if len(stored) != 1 or tensor_type(stored[0]).shape != (count,):
        raise odd("what is added to the scores of its experts is not a number stored for each")
    return stored[0]


def _scored(scores: fx.Node, nodes: set[fx.Node]) -> tuple[fx.Node, str]:
    """The products that scores are made of, and how."""
    if is_op(scores, "aten.softmax.int"):
        return _unsoftened(scores, nodes), "softmax"
    if is_op(scores, "aten.sigmoid.default"):
        nodes.add(scores)
        return _uncast(scores.args[0], nodes), "sigmoid"
    raise odd(f"its experts are chosen by {_made(scores)}, not by a softmax or sigmoids")


def _unsoftened(softmax: fx.Node, nodes: set[fx.Node]) -> fx.Node:
    if softmax.args[1] not in (-1, tensor_type(softmax).rank - 1):
        raise odd(f"{softmax.name} goes over axis {softmax.args[1]}, not over experts")
    nodes.add(softmax)
    return _uncast(softmax.args[0], nodes)


# ** before and behind **


def read_norm(h: fx.Node, readers: Collection[fx.Node]) -> tuple[Before, frozenset[fx.Node]] | None:
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
