"""Lifts of root-mean-square and layer norms."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.dims import same
from ...ir.graph import Program, tensor_type
from .matching import Either, Last, Lift, Match, Number, Tensor, Var, call, emit

_X = Var("x")
_SQUARE = Either(
    (
        call("pow.Tensor_Scalar", _X, Number(value=2)),
        call("mul.Tensor", _X, _X),
        call("square.default", _X),
    )
)
_MEAN = call("mean.dim", _SQUARE, Last(), True)
_SUM = call("add.Tensor|add.Scalar", _MEAN, Number("eps"))
_BARE = Either(
    (
        call("mul.Tensor", _X, call("rsqrt.default", _SUM)),
        call("mul.Tensor", _X, call("pow.Tensor_Scalar", _SUM, Number(value=-0.5))),
        call("div.Tensor", _X, call("sqrt.default", _SUM)),
    )
)
_GAIN = Tensor("gain", 1)
_ONE_PLUS = call("add.Tensor|add.Scalar", _GAIN, Number(value=1), bind="one_plus")


def _rms(program: Program, found: Match) -> fx.Node | str:
    x, eps = found.bound["x"], float(found.bound["eps"])
    gain = found.bound.get("gain")
    if gain is not None and gain.op != "get_attr":
        return f"expected a stored gain, found {gain.name}"
    if gain is not None and not same(tensor_type(gain).shape[0], tensor_type(x).shape[-1]):
        return f"expected a gain of {tensor_type(x).shape[-1]}, found {tensor_type(gain)}"
    args = (x,) if gain is None else (x, gain)
    offset = {"offset": 1.0} if "one_plus" in found.bound else {}
    return emit(program, found, "rms_norm", "llmc.rms_norm", *args, eps=eps, **offset)


RMS_NORM = Lift(
    "rms_norm",
    (
        call("mul.Tensor", _BARE, _ONE_PLUS),
        call("mul.Tensor", _BARE, _GAIN),
        _BARE,
    ),
    _rms,
    anchors=("aten.rsqrt.default",),
)


def _centred(program: Program, found: Match) -> fx.Node | str:
    """A root-mean-square norm of x - mean(x) is the layer norm of x without bias."""
    inner = found.root
    if inner.kwargs.get("count") is not None or inner.kwargs.get("offset"):
        return "expected a plain gain"
    args = (found.bound["x"], *inner.args[1:])
    eps = inner.kwargs["eps"]
    return emit(program, found, "layer_norm", "llmc.layer_norm", *args, eps=eps)


CENTRED = Lift(
    "layer_norm",
    (call("llmc.rms_norm", call("sub.Tensor", _X, call("mean.dim", _X, Last(), True))),),
    _centred,
)


def _aten_rms(program: Program, found: Match) -> fx.Node | str:
    """torch.nn.RMSNorm; without an eps it takes the smallest step of its dtype."""
    node = found.root
    x, shape, *rest = node.args
    assert isinstance(x, fx.Node)
    if not isinstance(shape, (list, tuple)) or len(shape) != 1:
        return f"expected a norm over the last axis, found one over {shape}"
    gain, eps = (*rest, None, None)[:2]
    gain, eps = node.kwargs.get("weight", gain), node.kwargs.get("eps", eps)
    given = torch.finfo(tensor_type(x).dtype).eps if eps is None else eps
    assert isinstance(given, (int, float))
    args = (x,) if gain is None else (x, gain)
    return emit(program, found, "rms_norm", "llmc.rms_norm", *args, eps=float(given))


ATEN_RMS_NORM = Lift("rms_norm", (call("rms_norm.default", _X),), _aten_rms)


def _layer(program: Program, found: Match) -> fx.Node | str:
    node = found.root
    x, shape, *rest = node.args
    assert isinstance(x, fx.Node)
    if not isinstance(shape, (list, tuple)) or len(shape) != 1:
        return f"expected a norm over the last axis, found one over {shape}"
    gain, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
    gain, bias = node.kwargs.get("weight", gain), node.kwargs.get("bias", bias)
    eps = node.kwargs.get("eps", eps)
    args = [x, gain, bias]
    while args[-1] is None:
        args.pop()
    return emit(program, found, "layer_norm", "llmc.layer_norm", *args, eps=float(str(eps)))


LAYER_NORM = Lift("layer_norm", (call("layer_norm.default", _X),), _layer)
