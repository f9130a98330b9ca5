"""Lifts of activations, plain or written out, and of gated products."""

from __future__ import annotations

import math

from torch import fx

from ...ir.graph import Program, tensor_type
from .matching import Either, Lift, Match, Number, Var, call, emit

_X = Var("x")


def _named(act: str) -> Lift:
    patterns = {"silu": _SILU, "gelu": _GELU, "gelu_tanh": _GELU_TANH, "relu": _RELU}

    def build(program: Program, found: Match) -> fx.Node | str:
        if "gelu" in found.bound:
            how = found.bound["gelu"].kwargs.get("approximate", "none")
            if {"none": "gelu", "tanh": "gelu_tanh"}.get(str(how)) != act:
                return f"expected {act}, found approximate={how}"
        if any(a is not None for a in found.root.args[1:] if found.root.target == "elu"):
            return "expected no further arguments"
        return emit(
            program, found, f"activation.{act}", "llmc.activation", found.bound["x"], act=act
        )

    return Lift(f"activation.{act}", (patterns[act],), build)


_MUL = "mul.Tensor"
_HALF_X = Either((call(_MUL, _X, Number(value=0.5)), call("div.Tensor", _X, Number(value=2.0))))
_CUBE = call("pow.Tensor_Scalar", _X, Number(value=3.0))
_INNER = call("add.Tensor", _X, call(_MUL, _CUBE, Number(value=0.044715)))
_TANH = call("tanh.default", call(_MUL, _INNER, Number(value=math.sqrt(2 / math.pi))))
_ERF = call(
    "erf.default",
    Either(
        (
            call("div.Tensor", _X, Number(value=math.sqrt(2))),
            call(_MUL, _X, Number(value=math.sqrt(0.5))),
        )
    ),
)
_GELU_OP = call("gelu.default", _X, bind="gelu")


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


_SILU = Either((call("silu.default", _X), call(_MUL, _X, call("sigmoid.default", _X))))
_RELU = call("relu.default", _X)
_GELU = Either((_GELU_OP, _half_times(_ERF)))
_GELU_TANH = Either((_GELU_OP, _half_times(_TANH)))

ACTIVATIONS = tuple(_named(act) for act in ("silu", "gelu", "gelu_tanh", "relu"))


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
