"""Where values come from and go to: walks along the data flow that the analyses share."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping

from torch import fx

from .ties import is_element, op_name

LINEAR = "aten.linear.default"
EXPERTS = "llmc.experts"

# Ops whose result holds the same numbers in the same memory. A reshape may copy; it counts as a
# view, as it is one wherever the layout allows.
VIEWS = frozenset({
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
    "aten.transpose.int", "aten.permute.default", "aten.t.default", "aten.unsqueeze.default",
    "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.flatten.using_ints",
    "aten.unflatten.int", "aten.alias.default", "aten.detach.default", "aten.dropout.default",
})  # fmt: skip

# Ops that only move, rename or retype numbers: each output element is one input element.
MOVES = VIEWS | {
    "aten.contiguous.default", "aten.clone.default", "aten.lift_fresh_copy.default",
    "aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.type_as.default",
}  # fmt: skip

# Ops whose result is a part of their first argument.
CUTS = frozenset({
    "aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default",
    "aten.narrow.default",
})  # fmt: skip

NONLINEAR = frozenset({
    "llmc.activation", "aten.relu.default", "aten.gelu.default", "aten.silu.default",
    "aten.sigmoid.default", "aten.tanh.default", "aten.mish.default", "aten.hardswish.default",
    "aten.softplus.default", "aten.leaky_relu.default", "aten.elu.default", "aten.relu6.default",
})  # fmt: skip
CHOOSE = frozenset({
    "aten.topk.default", "aten.sort.default", "aten.argmax.default", EXPERTS,
})  # fmt: skip


def is_plain_move(node: object) -> bool:
    """Whether a call moves the numbers of one tensor without changing them."""
    return op_name(node) in MOVES


def is_move(node: object) -> bool:
    """Whether a call moves numbers without changing them (the element of a tuple included)."""
    return is_plain_move(node) or is_element(node)


def is_cut(node: object) -> bool:
    """Whether a call takes a part of its first argument."""
    return op_name(node) in CUTS


def forward(
    start: fx.Node, rank: Mapping[fx.Node, int], stop: Callable[[fx.Node, set[fx.Node]], bool]
) -> Iterator[tuple[fx.Node, int]]:
    """(reader, argument index) of everything that a value flows into, in graph order.

    ``stop(reader, reached)`` ends the walk behind a reader; ``reached`` are the values so far. The
    index is -1 for keyword and nested arguments.
    """
    reached, heap, seen = {start}, [(rank[u], u) for u in start.users], set(start.users)
    heapq.heapify(heap)
    while heap:
        _, user = heapq.heappop(heap)
        inside = [v for v in user.all_input_nodes if v in reached]
        for value in inside:
            places = [i for i, a in enumerate(user.args) if a is value]
            yield from ((user, i) for i in places or [-1])
        if not stop(user, reached):
            reached.add(user)
            for u in user.users:
                if u not in seen:
                    seen.add(u)
                    heapq.heappush(heap, (rank[u], u))


def origin(value: fx.Node, through: Callable[[fx.Node], bool]) -> fx.Node:
    """Where a value comes from, walking back first arguments of nodes where ``through``."""
    while value.op == "call_function" and through(value):
        first = value.args[0]
        while isinstance(first, (list, tuple)):
            first = first[0]
        if not isinstance(first, fx.Node):
            break
        value = first
    return value
