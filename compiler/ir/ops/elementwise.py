"""Rows of the aten ops that work element by element, with broadcasting and torch's promotion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dims import numel
from ..errors import ModelError
from ..types import TensorType
from .base import aten
from .rules import Samples, broadcast, broadcast_ties, positive, promote, randn, to_float


def _tensors(args: tuple[Any, ...]) -> list[TensorType]:
    found = [a for a in args if isinstance(a, TensorType)]
    if not found:
        raise ModelError("expected a tensor argument, found none")
    return found


def _promoted(*args: Any, alpha: Any = 1, **attrs: Any) -> TensorType:
    return TensorType(broadcast(*(t.shape for t in _tensors(args))), promote(*args))


def _floating(*args: Any, **attrs: Any) -> TensorType:
    out = _promoted(*args)
    return out.with_dtype(to_float(out.dtype))


def _boolean(*args: Any, **attrs: Any) -> TensorType:
    return _promoted(*args).with_dtype(torch.bool)


def _divided(*args: Any, rounding_mode: str | None = None) -> TensorType:
    return _floating(*args) if rounding_mode is None else _promoted(*args)


def _integral(*args: Any, **attrs: Any) -> TensorType:
    out = _promoted(*args)
    if out.dtype.is_floating_point:
        raise ModelError(f"expected integers or bools, found {out}")
    return out


def _unary(x: TensorType, *rest: Any, **attrs: Any) -> TensorType:
    return x


def _unary_float(x: TensorType, *rest: Any, **attrs: Any) -> TensorType:
    return x.with_dtype(to_float(x.dtype))


def _row(
    name: str, infer: Callable[..., Any], samples: Callable[[], Samples], work: int = 1
) -> None:
    aten(
        name,
        infer,
        ties=broadcast_ties,
        flops=lambda out, *t, **a: work * numel(out.shape),
        samples=samples,
    )


def _pair(*more: Any) -> Callable[[], Samples]:
    return lambda: [((randn(2, 3), positive(3), *more), {}), ((randn(2, 1, 3), positive(4, 1)), {})]


def _number(*values: Any) -> Callable[[], Samples]:
    return lambda: [((positive(2, 3), v), {}) for v in values]


def _ints() -> Samples:
    return [((torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 2, 1])), {})]


def _bools() -> Samples:
    a = torch.tensor([[True, False], [True, True]])
    return [((a, torch.tensor([True, False])), {})]


for _name in ("add", "sub", "mul"):
    _row(f"{_name}.Tensor", _promoted, lambda: [*_pair()(), *_ints(), *_number(2, 1.5)()])
    _row(f"{_name}.Scalar", _promoted, _number(2, 1.5))
_row("div.Tensor", _divided, lambda: [*_pair()(), *_ints(), *_number(2)()])
_row("div.Scalar", _divided, _number(2, 1.5))
_row("div.Tensor_mode", _divided, lambda: [(a, {"rounding_mode": "floor"}) for a, _ in _ints()])
_row("div.Scalar_mode", _divided, lambda: [((torch.arange(6), 4), {"rounding_mode": "trunc"})])
_row("floor_divide.default", _promoted, _ints)
_row("remainder.Scalar", _promoted, lambda: [((torch.arange(6), 4), {})])
_row("remainder.Tensor", _promoted, _ints)
_row("rsub.Scalar", _promoted, _number(1, 2.5))
_row("rsub.Tensor", _promoted, _pair())
_row("pow.Tensor_Scalar", _promoted, _number(2, 3.0, 0.5, -1), 2)
_row("pow.Tensor_Tensor", _promoted, lambda: [((positive(2, 3), randn(3)), {})], 2)
_row("pow.Scalar", _promoted, lambda: [((2.0, randn(2, 3)), {}), ((2, torch.arange(3)), {})], 2)
for _name in ("maximum.default", "minimum.default", "max.other", "min.other"):
    _row(_name, _promoted, _pair())
_row("addcmul.default", _promoted, lambda: [((randn(2, 3), randn(3), randn(2, 3)), {"value": 0.5})])
_row("lerp.Scalar", _promoted, lambda: [((randn(2, 3), positive(2, 3), 0.3), {})])

for _name in ("neg", "abs", "relu", "sign", "floor", "ceil", "round", "square"):
    _row(f"{_name}.default", _unary, lambda: [((positive(2, 3),), {}), ((-positive(4),), {})])
for _name in ("exp", "sqrt", "rsqrt", "reciprocal", "log", "log1p", "erf", "cos", "sin", "sigmoid",
              "tanh", "expm1"):  # fmt: skip
    _row(f"{_name}.default", _unary_float, lambda: [((positive(2, 3),), {})], 4)
for _name in ("silu", "mish", "hardswish", "hardsigmoid", "softplus", "log_sigmoid"):
    _row(f"{_name}.default", _unary, lambda: [((randn(2, 3),), {})], 4)
_row(
    "gelu.default",
    _unary,
    lambda: [((randn(2, 3),), {"approximate": a}) for a in ("none", "tanh")],
    4,
)
_row("leaky_relu.default", _unary, lambda: [((randn(2, 3), 0.1), {})])
_row("elu.default", _unary, lambda: [((randn(2, 3),), {})], 4)
_row("hardtanh.default", _unary, lambda: [((randn(2, 3), -0.5, 0.5), {})])
_row("relu6.default", _unary, lambda: [((randn(2, 3),), {})])
_row("clamp.default", _unary, lambda: [((randn(2, 3), -0.5, None), {}), ((randn(2, 3), -1, 1), {})])
_row("clamp_min.default", _unary, lambda: [((randn(2, 3), -0.5), {})])
_row("clamp_max.default", _unary, lambda: [((randn(2, 3), 0.5), {})])

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _row(f"{_name}.Tensor", _boolean, lambda: [*_pair()(), *_ints()])
    _row(f"{_name}.Scalar", _boolean, _number(1))
for _name in ("logical_and", "logical_or", "logical_xor"):
    _row(f"{_name}.default", _boolean, lambda: [*_bools(), *_pair()()])
_row("logical_not.default", _boolean, lambda: [((randn(2, 3),), {})])
_row("isinf.default", _boolean, lambda: [((randn(2, 3),), {})])
_row("isnan.default", _boolean, lambda: [((randn(2, 3),), {})])
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    _row(f"{_name}.Tensor", _integral, lambda: [*_bools(), *_ints()])
    _row(f"{_name}.Scalar", _integral, lambda: [((torch.arange(4), 3), {})])
# export keeps the operator's own spelling of a mask product
_row("__and__.Tensor", _integral, _bools)
_row("__or__.Tensor", _integral, _bools)
_row("bitwise_not.default", _integral, lambda: [((torch.tensor([True, False]),), {})])


def _where(mask: TensorType, a: Any, b: Any) -> TensorType:
    if mask.dtype != torch.bool:
        raise ModelError(f"expected a bool condition, found {mask}")
    found = [t for t in (mask, a, b) if isinstance(t, TensorType)]
    return TensorType(broadcast(*(t.shape for t in found)), promote(a, b))


def _masked_fill(x: TensorType, mask: TensorType, value: Any) -> TensorType:
    if mask.dtype != torch.bool:
        raise ModelError(f"expected a bool mask, found {mask}")
    return TensorType(broadcast(x.shape, mask.shape), x.dtype)


def _mask() -> torch.Tensor:
    return torch.tensor([[True, False, True], [False, False, True]])


_row("where.self", _where, lambda: [((_mask(), randn(2, 3), randn(3)), {})])
_row("where.ScalarOther", _where, lambda: [((_mask(), randn(2, 3), 0.0), {})])
_row("where.ScalarSelf", _where, lambda: [((_mask(), 1.0, randn(2, 3)), {})])
_row("where.Scalar", _where, lambda: [((_mask(), 0.0, 1.0), {})])
_row("masked_fill.Scalar", _masked_fill, lambda: [((randn(2, 3), _mask(), -1.0), {})])
_row(
    "masked_fill.Tensor",
    _masked_fill,
    lambda: [((randn(2, 3), _mask(), torch.tensor(-1.0, dtype=torch.float64)), {})],
)


# ** same value, perhaps another dtype **


def _cast(x: TensorType, *rest: Any, dtype: torch.dtype | None = None, **attrs: Any) -> TensorType:
    positional = [r for r in rest if isinstance(r, torch.dtype)]
    return x.with_dtype(dtype or (positional[0] if positional else x.dtype))


def _cast_like(x: TensorType, other: TensorType, *rest: Any, **attrs: Any) -> TensorType:
    return x.with_dtype(other.dtype)


def _no_dropout(x: TensorType, p: float, train: bool) -> TensorType:
    if train and p > 0:
        raise ModelError(f"expected dropout in eval mode, found p={p} in training")
    return x


_row("_to_copy.default", _cast, lambda: [((randn(2, 3),), {"dtype": torch.float32})], 0)
_row("to.dtype", _cast, lambda: [((randn(2, 3), torch.float32), {})], 0)
_row("to.dtype_layout", _cast, lambda: [((randn(2, 3),), {"dtype": torch.float32})], 0)
aten(
    "type_as.default",
    _cast_like,
    ties=lambda out, x, *rest, **attrs: broadcast_ties(out, x),
    flops=lambda *types, **attrs: 0,
    samples=lambda: [((randn(2, 3), randn(2).float()), {})],
)
_row("dropout.default", _no_dropout, lambda: [((randn(2, 3), 0.1, False), {})], 0)
for _name in ("clone", "alias", "detach", "contiguous", "lift_fresh_copy"):
    _row(f"{_name}.default", _unary, lambda: [((randn(2, 3),), {})], 0)
