"""What a linear's input went through: a norm -> times a vector -> round_input -> linear.

The norm is an rms_norm or a layer_norm; instead of a vector alone there may be a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..compiler.ir.graph import tensor_type
from ..compiler.ir.ops.rounding import FLOATS
from .fuse_nodes import Unfit, argument, constant, is_op


@dataclass(frozen=True)
class Before:
    """One step of what an input went through: "rounds", "mixed", "smooth" or "norm".

    A rotation is a vector that multiplies, as smoothing is, and a mix behind it.
    """

    kind: str
    node: fx.Node
    parts: Mapping[str, fx.Node]

    @property
    def reads(self) -> fx.Node:
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        if self.kind == "smooth" and x is self.parts["smooth"]:
            x = self.node.args[1]
            assert isinstance(x, fx.Node)
        return x


def read_before(reads: fx.Node) -> list[Before]:
    """What made a linear's input, nearest first: rounding, then smoothing, then a norm."""
    found: list[Before] = []
    node: Any = reads
    if is_op(node, "llmc.round_input"):
        scale, columns = (argument(node, i, n) for i, n in ((1, "scale"), (2, "columns")))
        if not all(p is None or constant(p) for p in (scale, columns)):
            return found
        found.append(Before("rounds", node, {} if scale is None else {"in_scale": scale}))
        node = node.args[0]
    turned = is_op(node, "llmc.rotate") and not node.kwargs.get("inverse")
    if turned and constant(node.args[1]):
        found.append(Before("mixed", node, {"smooth": node.args[1]}))
        node = node.args[0]
    elif is_op(node, "aten.mul.Tensor") and len(node.args) == 2:
        vectors = [a for a in node.args if _vector(a)]
        width = tensor_type(node).shape[-1]
        if len(vectors) == 1 and tensor_type(vectors[0]).shape[0] == width:
            found.append(Before("smooth", node, {"smooth": vectors[0]}))
            node = found[-1].reads
    if is_norm(node):
        given = {"gain": argument(node, 1, "gain")}
        if centred(node):
            given["shift"] = argument(node, 2, "bias")
        found.append(Before("norm", node, {k: v for k, v in given.items() if v is not None}))
    return found


def is_norm(node: object) -> bool:
    return is_op(node, "llmc.rms_norm") or is_op(node, "llmc.layer_norm")


def centred(norm: fx.Node) -> bool:
    """Whether a norm takes the mean away."""
    return is_op(norm, "llmc.layer_norm")


def _vector(value: Any) -> bool:
    return isinstance(value, fx.Node) and tensor_type(value).rank == 1 and constant(value)


def norm_refusal(norm: fx.Node) -> Unfit | None:
    """Why a kernel cannot make a norm of its input; None when it can."""
    gain = argument(norm, 1, "gain")
    if gain is not None and not constant(gain):
        return Unfit("the norm's gain is not stored", "stored_gain")
    shift = argument(norm, 2, "bias") if centred(norm) else None
    if shift is not None and not constant(shift):
        return Unfit("the norm's bias is not stored", "stored_shift")
    x = norm.args[0]
    assert isinstance(x, fx.Node)
    width, count = tensor_type(x).shape[-1], norm.kwargs.get("count")
    if count is not None and count != width:
        return Unfit(f"the norm divides by {count}, its input has {width} columns", "count")
    return None


def grid_words(x: object, *, values: bool = False) -> str:
    """The grid that a call puts its input on, e.g. "int8 token"; with ``values`` group= and limit=.

    Empty where the node is no such call.
    """
    if not isinstance(x, fx.Node) or not is_op(x, "llmc.round_input"):
        return ""
    k = x.kwargs
    words = [f"{k['kind']}{'' if k['kind'] in FLOATS else k['bits']}", str(k["per"])]
    for name in ("group", "power", "limit"):
        if k.get(name):
            words.append(f"{name}={k[name]}" if values and name != "power" else name)
    return " ".join(words)
