"""A linear that reads a norm's result in another shape reads it as it is, and is reshaped behind.

So the norm can be part of its kernel, where only axes of 1 stand between them.
"""

from __future__ import annotations

from torch import fx

from ..compiler.ir.dims import same_shape
from ..compiler.ir.graph import Program, tensor_type
from .fuse_before import is_norm
from .fuse_nodes import MAKER, is_op, only_user

_VIEWS = ("aten.reshape.default", "aten.view.default")


def read_norms(program: Program) -> dict[str, str]:
    """Move views behind linears, in place; the linear that each new call takes the place of."""
    made: dict[str, str] = {}
    for linear in list(program.calls("aten.linear.default")):
        view, *rest = linear.args
        assert isinstance(view, fx.Node)
        if not any(is_op(view, name) for name in _VIEWS) or only_user(view) is not linear:
            continue
        norm = view.args[0]
        assert isinstance(norm, fx.Node)
        if not is_norm(norm) or not _only_ones(norm, view):
            continue
        shape = view.args[1]
        assert isinstance(shape, (list, tuple))
        width = tensor_type(linear).shape[-1]
        product = program.emit(
            "aten.linear.default", norm, *rest, before=linear, made_by=MAKER, like=linear
        )
        back = program.emit(
            "aten.reshape.default", product, [*shape[:-1], width], before=linear, made_by=MAKER,
            like=linear,
        )  # fmt: skip
        made |= {product.name: linear.name, back.name: linear.name}
        linear.replace_all_uses_with(back)
        program.graph.erase_node(linear)
        program.graph.erase_node(view)
    return made


def _only_ones(one: fx.Node, other: fx.Node) -> bool:
    """Whether two shapes differ by axes of 1 alone, and not in the last one."""
    a, b = (tensor_type(n).shape for n in (one, other))
    ends = same_shape(a[-1:], b[-1:])
    return ends and same_shape(*(tuple(d for d in s if d != 1) for s in (a, b)))
