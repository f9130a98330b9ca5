"""Lifts of rotary position embeddings; a partial one lifts on its slice."""

from __future__ import annotations

from torch import fx

from ...ir.dims import same
from ...ir.graph import Program, tensor_type
from .matching import Last, Lift, Match, Var, call, emit

_X = Var("x")
_ROTATED = call(
    "cat.default",
    [
        call("neg.default", call("slice.Tensor", _X, Last(), Var("b0"), Var("b1"))),
        call("slice.Tensor", _X, Last(), Var("a0"), Var("a1")),
    ],
    Last(),
)


def _rope(program: Program, found: Match) -> fx.Node | str:
    x, cos, sin = (found.bound[k] for k in ("x", "cos", "sin"))
    size = tensor_type(x).shape[-1]
    bounds = [found.bound[k] for k in ("a0", "a1", "b0", "b1")]
    if not isinstance(size, int) or bounds != [0, size // 2, size // 2, size] or size % 2:
        return f"expected halves of {size} channels, found slices at {bounds}"
    for part in (cos, sin):
        t = tensor_type(part)
        if t.rank > tensor_type(x).rank or not same(t.shape[-1], size):
            return f"expected cos and sin of {size} channels, found {t}"
    return emit(program, found, "rope", "llmc.rope", x, cos, sin)


ROPE = Lift(
    "rope",
    (
        call(
            "add.Tensor",
            call("mul.Tensor", _X, Var("cos")),
            call("mul.Tensor", _ROTATED, Var("sin")),
        ),
    ),
    _rope,
)

_EVEN = call("slice.Tensor", _X, Last(), 0, Var("e1"), 2, bind="even")
_ODD = call("slice.Tensor", _X, Last(), 1, Var("o1"), 2, bind="odd")
_COS, _SIN = Var("cos"), Var("sin")


def _regrouped(program: Program, found: Match) -> fx.Node | str:
    """Channels 2i and 2i+1 rotate together and come out as halves: regroup them, then rotate."""
    even, odd, cos, sin = (found.bound[k] for k in ("even", "odd", "cos", "sin"))
    t = tensor_type(even)
    if not same(t.shape[-1], tensor_type(odd).shape[-1]):
        return f"expected an even number of channels, found {tensor_type(found.bound['x'])}"
    parts = [[even, odd]]
    for part in (cos, sin):
        if not isinstance(part, fx.Node) or not same(tensor_type(part).shape[-1], t.shape[-1]):
            return f"expected cos and sin of {t.shape[-1]} channels, found {part}"
        parts.append([part, part])
    x, wide_cos, wide_sin = (
        emit(program, found, "rope", "aten.cat.default", p, tensor_type(p[0]).rank - 1)
        for p in parts
    )
    return emit(program, found, "rope", "llmc.rope", x, wide_cos, wide_sin)


_REAL = call("sub.Tensor", call("mul.Tensor", _EVEN, _COS), call("mul.Tensor", _ODD, _SIN))
_IMAGINARY = call("add.Tensor", call("mul.Tensor", _ODD, _COS), call("mul.Tensor", _EVEN, _SIN))
REGROUPED = Lift("rope", (call("cat.default", [_REAL, _IMAGINARY], Last()),), _regrouped)

_STACKED = call("stack.default", [call("neg.default", _ODD), _EVEN], -1)


def _interleaved(program: Program, found: Match) -> fx.Node | str:
    x, cos, sin = (found.bound[k] for k in ("x", "cos", "sin"))
    size = tensor_type(x).shape[-1]
    if not isinstance(size, int) or size % 2:
        return f"expected an even number of channels, found {size}"
    for part in (cos, sin):
        if not isinstance(part, fx.Node) or tensor_type(part).rank > tensor_type(x).rank:
            return f"expected cos and sin of {size} channels, found {part}"
        if not same(tensor_type(part).shape[-1], size):
            return f"expected cos and sin of {size} channels, found {tensor_type(part)}"
    return emit(program, found, "rope", "llmc.rope", x, cos, sin, interleaved=True)


_TURNED = call("flatten.using_ints", _STACKED, -2)
INTERLEAVED = Lift(
    "rope",
    (call("add.Tensor", call("mul.Tensor", _X, _COS), call("mul.Tensor", _TURNED, _SIN)),),
    _interleaved,
)

ROPES = (ROPE, REGROUPED, INTERLEAVED)
