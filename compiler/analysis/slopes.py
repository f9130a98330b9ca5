"""Biases of scores that are a slope of each head times the position of each key (ALiBi).

Such a bias needs no layout of all keys: a slope per head says it of any two tokens. A softmax does
not see what all its scores have in common, so that only distances matter, from whatever token
positions are counted. Source: Press et al., arXiv 2108.12409 §3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from ..ir.dims import Dim, same_shape
from ..ir.graph import Program, tensor_type
from ..ir.ops import row_of

# Calls that keep the order of a value's entries.
_VIEWS = frozenset({
    "aten.unsqueeze.default", "aten.squeeze.dim", "aten.reshape.default", "aten.view.default",
    "aten.to.dtype", "aten.alias.default",
})  # fmt: skip
_K_POS, _K_VALID, _BIAS = 4, 5, 6


@dataclass(frozen=True)
class Slopes:
    """``param`` holds a slope per head along ``axis``; its other axes are 1."""

    param: fx.Node
    axis: int


def slopes_of(node: fx.Node) -> Slopes | str:
    """The slopes of the bias of a ``llmc.attention``, or why it has none.

    Positions are those that the call gives for keys, or the real tokens counted: those that each
    row's first real token is the first of.
    """
    bias, k_pos, k_valid = (
        node.args[at] if len(node.args) > at else node.kwargs.get(name)
        for at, name in ((_BIAS, "bias"), (_K_POS, "k_pos"), (_K_VALID, "k_valid"))
    )
    if not isinstance(bias, fx.Node):
        return "the scores have no bias"
    product = _viewed(bias)
    if _name(product) != "aten.mul.Tensor" or len(product.all_input_nodes) != 2:
        return f"{product.name} makes the bias, no product of slopes and positions"
    heads, keys = (tensor_type(node.args[i]).shape for i in (0, 1))  # type: ignore[arg-type]
    found, made = tensor_type(bias).shape, tensor_type(product).shape
    if len(found) != 4 or not same_shape(found[1:], (heads[1], 1, keys[2])):
        return f"expected a bias [B, {heads[1]}, 1, {keys[2]}], found {tensor_type(bias)}"
    if not _unit(made, found):
        return f"expected the product {tensor_type(product)} in the order of the bias"
    for one, other in (product.all_input_nodes, product.all_input_nodes[::-1]):
        param, axis = _viewed(one), _long(_viewed(one))
        if param.op != "get_attr" or axis is None or not _along(one, made, heads[1]):
            continue
        if tensor_type(product).dtype.itemsize < 4:
            return f"{product.name} rounds the products of slopes and positions"
        if _counts(_viewed(other), k_pos, k_valid):
            return Slopes(param, axis)
        return f"{_viewed(other).name} is no position of a key that attention knows"
    return f"expected one slope for each of {heads[1]} heads in {product.name}"


def _viewed(node: fx.Node) -> fx.Node:
    """What a value is a view of."""
    while _name(node) in _VIEWS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _name(node: fx.Node) -> str:
    return row_of(node).name if node.op == "call_function" else ""


def _unit(*shapes: Iterable[Dim]) -> bool:
    """Whether two shapes are the same but for axes of 1."""
    one, two = (tuple(d for d in shape if d != 1) for shape in shapes)
    return same_shape(one, two)


def _long(value: fx.Node) -> int | None:
    """The one axis of a value that is longer than 1."""
    long = [a for a, d in enumerate(tensor_type(value).shape) if d != 1]
    return long[0] if len(long) == 1 else None


def _along(value: fx.Node, made: tuple[Dim, ...], heads: Dim) -> bool:
    """Whether a factor of a product [.., H, .., S] holds one number for each head."""
    shape, axis = tensor_type(value).shape, _long(value)
    at = next((a for a, d in enumerate(made) if d == heads), None)
    if axis is None or at is None or shape[axis] != heads:
        return False
    return len(shape) - axis == len(made) - at


def _counts(node: fx.Node, k_pos: object, k_valid: object) -> bool:
    """Whether a value is the keys' positions, or how many real tokens come before each."""
    if node is k_pos:
        return True
    if _name(node) == "aten.mul.Tensor" and len(node.all_input_nodes) == 2:
        # Those that are not real are not read, whatever they count.
        others = [n for n in map(_viewed, node.all_input_nodes) if n is not k_valid]
        if len(others) != 1:
            return False
        node = others[0]
    if _name(node) not in ("aten.sub.Tensor", "aten.add.Tensor") or node.kwargs:
        return False
    total, by = node.args[0], node.args[1]
    if not isinstance(total, fx.Node) or isinstance(by, fx.Node):
        return False
    total = _viewed(total)
    if _name(total) != "aten.cumsum.default" or total.args[1] not in (1, -1):
        return False
    counted = total.args[0]
    assert isinstance(counted, fx.Node)
    return k_valid is not None and _viewed(counted) is k_valid


def makers(program: Program) -> frozenset[fx.Node]:
    """Calls that only make biases which slopes say as well: without these nobody reads them."""
    served = {n for n in program.calls("llmc.attention") if isinstance(slopes_of(n), Slopes)}
    inside: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op != "call_function" or not node.users or not served:
            continue
        if all(user in inside or (user in served and _bias_alone(user, node))
               for user in node.users):  # fmt: skip
            inside.add(node)
    return frozenset(inside)


def _bias_alone(user: fx.Node, value: fx.Node) -> bool:
    """Whether an attention reads a value as its bias and as nothing else."""
    others = [*user.args[:_BIAS], *user.args[_BIAS + 1 :]]
    others += [v for name, v in user.kwargs.items() if name != "bias"]
    return value not in others
