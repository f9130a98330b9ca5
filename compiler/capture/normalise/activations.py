"""Lifts of activations, plain or written out, and of gated products."""

from __future__ import annotations

import math

from torch import fx

from ...ir.graph import Program, tensor_type
from .matching import Either, Lift, Match, Number, Var, call, emit

_X = Var("x")


def _named(act: str, *patterns: object) -> Lift:
    """A lift of ``act``, in any of the ways it is written."""

    def build(program: Program, found: Match) -> fx.Node | str:
        return emit(
            program, found, f"activation.{act}", "llmc.activation", found.bound["x"], act=act
        )

    return Lift(f"activation.{act}", patterns, build)


def _gelu(program: Program, found: Match) -> fx.Node | str:
    how = str(found.root.kwargs.get("approximate", "none"))
    act = {"none": "gelu", "tanh": "gelu_tanh"}[how]
    return emit(program, found, f"activation.{act}", "llmc.activation", found.bound["x"], act=act)


_MUL = "mul.Tensor"
_HALF_X = Either((call(_MUL, _X, Number(value=0.5)), call("div.Tensor", _X, Number(value=2.0))))
_CUBE = call("pow.Tensor_Scalar", _X, Number(value=3.0))
_INNER = call("add.Tensor", _X, call(_MUL, _CUBE, Number(value=0.044715)))
_ROOT = Number(value=math.sqrt(2 / math.pi))
# The same polynomial with x taken out, as bloom writes it.
_SQUARE = call(_MUL, call(_MUL, _X, Number(value=0.044715)), _X)
_TAKEN_OUT = call(_MUL, call(_MUL, _X, _ROOT), call("add.Tensor", _SQUARE, Number(value=1.0)))
_TANH = call("tanh.default", Either((call(_MUL, _INNER, _ROOT), _TAKEN_OUT)))
_ERF = call(
    "erf.default",
    Either(
        (
            call("div.Tensor", _X, Number(value=math.sqrt(2))),
            call(_MUL, _X, Number(value=math.sqrt(0.5))),
        )
    ),
)


def _half_times(inner: object) -> Either:
    """0.5 · x · (1 + inner), in the orders that models write."""
    one = call("add.Tensor", inner, Number(value=1.0))
    return Either(
        (
            call(_MUL, _HALF_X, one),
            call(_MUL, call(_MUL, _X, one), Number(value=0.5)),
            call(_MUL, _X, call(_MUL, one, Number(value=0.5))),
        )
    )


_RELU = call("relu.default", _X)
_RELU2 = (
    call("pow.Tensor_Scalar", _RELU, Number(value=2.0)),
    call("square.default", _RELU),
    call(_MUL, _RELU, _RELU),
)

ACTIVATIONS = (
    _named("silu", call("silu.default", _X), call(_MUL, _X, call("sigmoid.default", _X))),
    _named("relu2", *_RELU2),
    _named("relu", _RELU),
    Lift("activation.gelu", (call("gelu.default", _X),), _gelu),
    _named("gelu", _half_times(_ERF)),
    _named("gelu_tanh", _half_times(_TANH)),
)


def _gated(program: Program, found: Match) -> fx.Node | str:
    gate, up, act = (found.bound[k] for k in ("gate", "up", "act"))
    if not isinstance(up, fx.Node) or tensor_type(up).shape != tensor_type(gate).shape:
        return "expected gate and up of one shape"
    return emit(program, found, "gated", "llmc.gated", gate, up, act=act.kwargs["act"])


GATED = Lift(
    "gated",
    (call(_MUL, call("llmc.activation", Var("gate"), bind="act"), Var("up")),),
    _gated,
)
