"""Rows of the aten ops that make tensors, all bounded, and of Python's operators on sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from ..dims import Dim, dim
from ..errors import ModelError
from ..types import SymType, TensorType, ValueType
from .base import OpRow, Tie, as_dim, aten, register
from .resize import Resize, sizes_at
from .rules import MAX_ELEMENTS, Samples, axis, kept, randn, shape_from


def _free(*types: Any, **attrs: Any) -> Dim:
    return 0


def _nothing(*types: Any, **attrs: Any) -> list[Tie]:
    """A constant along every axis: any axis may be cut when the size literal is changed with it."""
    return []


def _row(
    name: str, infer: Callable[..., Any], samples: Callable[[], Samples], ties: Any = _nothing,
    resize: Resize | None = None,
) -> None:  # fmt: skip
    aten(name, infer, ties=ties, flops=_free, samples=samples, resize=resize)


# ** from sizes **


def _filled(sizes: Any, *rest: Any, dtype: Any = None, **attrs: Any) -> TensorType:
    return TensorType(shape_from(sizes), dtype or torch.get_default_dtype())


def _full(sizes: Any, value: Any, *, dtype: Any = None, **attrs: Any) -> TensorType:
    natural = {bool: torch.bool, int: torch.int64}.get(type(value), torch.get_default_dtype())
    return TensorType(shape_from(sizes), dtype or natural)


def _new(x: TensorType, sizes: Any, *rest: Any, dtype: Any = None, **attrs: Any) -> TensorType:
    return TensorType(shape_from(sizes), dtype or x.dtype)


def _like(x: TensorType, *rest: Any, dtype: Any = None, **attrs: Any) -> TensorType:
    return x.with_dtype(dtype or x.dtype)


def _like_ties(out: TensorType, x: TensorType, *rest: Any, **attrs: Any) -> list[Tie]:
    return kept(range(x.rank), range(x.rank))


def _scalar(value: Any, *, dtype: Any = None, **attrs: Any) -> TensorType:
    return _full((), value, dtype=dtype)


for _name in ("zeros.default", "ones.default"):
    _row(
        _name,
        _filled,
        lambda: [(([2, 3],), {}), (([2],), {"dtype": torch.int64})],
        resize=sizes_at(0),
    )
# Only where every entry is written before it is read, as in the inverse of a permutation.
_row("empty.memory_format", _filled, lambda: [(([2, 3],), {})], resize=sizes_at(0))
_row(
    "full.default",
    _full,
    lambda: [(([2, 3], v), {}) for v in (1, 1.5, True)],
    resize=sizes_at(0),
)
for _name in ("new_zeros.default", "new_ones.default", "new_empty.default"):
    _row(
        _name,
        _new,
        lambda: [((randn(2), [2, 3]), {}), ((randn(2), [2]), {"dtype": torch.bool})],
        resize=sizes_at(1),
    )
_row("new_full.default", _new, lambda: [((randn(2), [2, 3], 1.5), {})], resize=sizes_at(1))
for _name in ("zeros_like", "ones_like", "empty_like"):
    _row(f"{_name}.default", _like, lambda: [((randn(2, 3),), {})], _like_ties)
_row("full_like.default", _like, lambda: [((randn(2, 3), 1.5), {})], _like_ties)
_row("scalar_tensor.default", _scalar, lambda: [((1.5,), {}), ((2,), {"dtype": torch.int32})])


# ** ranges **


def _range(start: Any, end: Any, step: Any, dtype: Any) -> TensorType:
    numbers = (start, end, step)
    natural = (
        torch.get_default_dtype() if any(isinstance(n, float) for n in numbers) else torch.int64
    )
    if any(isinstance(n, float) for n in numbers):
        if any(isinstance(n, SymType) for n in numbers) or not step:
            raise ModelError(f"expected literal float bounds, found {numbers}")
        size: Dim = max(int(sympy.ceiling((end - start) / step)), 0)
    else:
        low, high, by = (as_dim(n) for n in numbers)
        span = dim(high - low)
        if by == 1:
            size = max(span, 0) if isinstance(span, int) else span
        elif isinstance(span, int) and isinstance(by, int) and by:
            size = max(-(-span // by), 0)
        else:
            raise ModelError(f"expected literal bounds for step {by}, found {span}")
    if isinstance(size, int) and size > MAX_ELEMENTS:
        raise ModelError(f"expected at most {MAX_ELEMENTS} elements, found {size}")
    return TensorType((size,), dtype or natural)


def _arange(end: Any, *, dtype: Any = None, **attrs: Any) -> TensorType:
    return _range(0, end, 1, dtype)


def _arange_start(
    start: Any, end: Any, step: Any = 1, *, dtype: Any = None, **a: Any
) -> TensorType:
    return _range(start, end, step, dtype)


def _range_ties(*types: Any, **attrs: Any) -> list[Tie]:
    return [Tie("source", (), (0,))]


_row("arange.default", _arange, lambda: [((5,), {}), ((5,), {"dtype": torch.float32})], _range_ties)
_row("arange.start", _arange_start, lambda: [((2, 5), {})], _range_ties)
_row(
    "arange.start_step", _arange_start, lambda: [((0, 7, 2), {}), ((0, 1.0, 0.25), {})], _range_ties
)


# ** sizes **


def _sym_size(x: TensorType, where: int) -> SymType:
    return SymType(x.shape[axis(where, x.rank)])


_row("sym_size.int", _sym_size, lambda: [((randn(2, 3), 1), {})])


def _sym(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], ValueType]:
    def infer(a: Any, b: Any) -> ValueType:
        for v in (a, b):
            if not isinstance(v, (SymType, int)) or isinstance(v, bool):
                raise ModelError(f"expected sizes, found {v}")
        return SymType(dim(f(sympy.sympify(as_dim(a)), sympy.sympify(as_dim(b)))))

    return infer


def _quotient(a: Any, b: Any) -> Any:
    q = sympy.cancel(a / b)
    if sympy.denom(q) != 1:
        raise ModelError(f"expected {b} to divide {a}, found no proof")
    return q


def _op(
    name: str, target: Callable[..., Any], infer: Callable[..., Any], samples: Samples, ties: Any
) -> None:
    register(
        OpRow(f"operator.{name}", target, infer, target, ties, flops=_free, samples=lambda: samples)
    )


_op("add", operator.add, _sym(operator.add), [((2, 3), {})], _nothing)
_op("sub", operator.sub, _sym(operator.sub), [((5, 3), {})], _nothing)
_op("mul", operator.mul, _sym(operator.mul), [((2, 3), {})], _nothing)
_op("floordiv", operator.floordiv, _sym(lambda a, b: sympy.floor(a / b)), [((7, 2), {})], _nothing)
_op("truediv", operator.truediv, _sym(_quotient), [((6, 2), {})], _nothing)
_op("mod", operator.mod, _sym(lambda a, b: sympy.Mod(a, b)), [((7, 2), {})], _nothing)


def _neg(a: Any) -> SymType:
    if not isinstance(a, (SymType, int)):
        raise ModelError(f"expected a size, found {a}")
    return SymType(dim(-as_dim(a)))


_op("neg", operator.neg, _neg, [((3,), {})], _nothing)


def _getitem(values: Any, i: int) -> ValueType:
    if (
        not isinstance(values, tuple)
        or not isinstance(i, int)
        or not -len(values) <= i < len(values)
    ):
        raise ModelError(f"expected an element of a tuple, found {values}[{i}]")
    found: ValueType = values[i]
    return found


def _getitem_ties(out: Any, values: Any, i: int) -> list[Tie]:
    at = i % len(values)
    return (
        [Tie("same", ((at, a),), (a,)) for a in range(out.rank)]
        if isinstance(out, TensorType)
        else []
    )


_op("getitem", operator.getitem, _getitem, [(((randn(2), randn(3)), 1), {})], _getitem_ties)
