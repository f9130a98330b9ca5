"""Rows of the aten ops that reduce, scan, sort or pick along an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dims import Dim, numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, aten
from .rules import Samples, axes, axis, kept, mixed, positive, randn, to_float


def _without(x: TensorType, over: tuple[int, ...], keepdim: bool) -> tuple[Dim, ...]:
    if keepdim:
        return tuple(1 if a in over else d for a, d in enumerate(x.shape))
    return tuple(d for a, d in enumerate(x.shape) if a not in over)


def _reduced_ties(kind: str, pick: Callable[..., Any]) -> Callable[..., list[Tie]]:
    """Ties of a reduction; ``pick`` finds (axes, keepdim) in the arguments."""

    def ties(out: Any, x: TensorType, *args: Any, **attrs: Any) -> list[Tie]:
        over, keepdim = pick(x, *args, **attrs)
        rest = [a for a in range(x.rank) if a not in over]
        outs = rest if keepdim else range(len(rest))
        found = kept(rest, outs) + [Tie(kind, ((0, a),)) for a in over]
        if isinstance(out, tuple):
            found += [Tie(t.kind, t.ins, t.outs, result=1) for t in kept(rest, outs)]
        return found

    return ties


def _dims(x: TensorType, where: Any = None, keepdim: bool = False, **attrs: Any) -> Any:
    return axes(where, x.rank), keepdim


def _sum(
    x: TensorType, where: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> TensorType:
    natural = x.dtype if x.dtype.is_floating_point else torch.int64
    return TensorType(_without(x, axes(where, x.rank), keepdim), dtype or natural)


def _mean(
    x: TensorType, where: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> TensorType:
    found = dtype or x.dtype
    if not found.is_floating_point:
        raise ModelError(f"expected a floating mean, found {x}")
    return TensorType(_without(x, axes(where, x.rank), keepdim), found)


def _same_dtype(x: TensorType, where: Any = None, keepdim: bool = False) -> TensorType:
    return x.with_shape(*_without(x, axes(where, x.rank), keepdim))


def _truth(x: TensorType, where: Any = None, keepdim: bool = False) -> TensorType:
    return _same_dtype(x, where, keepdim).with_dtype(torch.bool)


def _position(x: TensorType, where: Any = None, keepdim: bool = False) -> TensorType:
    return _same_dtype(x, where, keepdim).with_dtype(torch.int64)


def _value_and_position(x: TensorType, where: Any, keepdim: bool = False) -> tuple[TensorType, ...]:
    return _same_dtype(x, where, keepdim), _position(x, where, keepdim)


def _floating(x: TensorType, where: Any = None, keepdim: bool = False, **attrs: Any) -> TensorType:
    out = _same_dtype(x, where, keepdim)
    return out.with_dtype(to_float(out.dtype))


def _row(name: str, infer: Callable[..., Any], kind: str, samples: Callable[[], Samples]) -> None:
    aten(name, infer, ties=_reduced_ties(kind, _dims), flops=_read, samples=samples)


def _read(out: Any, x: TensorType, *rest: Any, **attrs: Any) -> Dim:
    return numel(x.shape)


def _over(*more: Any) -> Callable[[], Samples]:
    return lambda: [((randn(2, 3, 4), *more), {}), ((randn(2, 3, 4), *more, True), {})]


def _all(*more: Any) -> Callable[[], Samples]:
    return lambda: [((randn(2, 3), *more), {})]


# A sum is a contraction of one axis; a mean divides by a length that a cut would change.
_row("sum.dim_IntList", _sum, "contract", lambda: [*_over([1])(), *_over([0, -1])(), *_all(None)()])
_row("sum.default", _sum, "contract", lambda: [*_all()(), ((torch.arange(3),), {})])
_row("mean.dim", _mean, "mix", lambda: [*_over([-1])(), *_over([0, 1])(), *_all(None)()])
_row("mean.default", _mean, "mix", _all())
_row("amax.default", _same_dtype, "mix", _over([1]))
_row("amin.default", _same_dtype, "mix", _over([1]))
_row("prod.dim_int", _sum, "mix", _over(1))
_row("max.default", _same_dtype, "mix", _all())
_row("min.default", _same_dtype, "mix", _all())
_row("max.dim", _value_and_position, "mix", _over(1))
_row("min.dim", _value_and_position, "mix", _over(1))
_row("argmax.default", _position, "mix", lambda: [*_over(1)(), *_all()()])
_row("argmin.default", _position, "mix", _over(1))
_row("any.default", _truth, "mix", lambda: [((torch.tensor([True, False]),), {})])
_row("any.dim", _truth, "mix", lambda: [((torch.tensor([[True, False]]), -1), {})])
_row("all.default", _truth, "mix", lambda: [((torch.tensor([True, False]),), {})])
_row("all.dim", _truth, "mix", lambda: [((torch.tensor([[True, False]]), -1), {})])
_row("logsumexp.default", _floating, "mix", _over([1]))


def _spread(
    x: TensorType, where: Any = None, *rest: Any, keepdim: bool = False, **a: Any
) -> TensorType:
    return _floating(x, where, keepdim)


def _spread_dims(
    x: TensorType, where: Any = None, *rest: Any, keepdim: bool = False, **a: Any
) -> Any:
    return axes(where, x.rank), keepdim


aten(
    "var.correction",
    _spread,
    ties=_reduced_ties("mix", _spread_dims),
    flops=_read,
    samples=lambda: [((randn(2, 3, 4), [-1]), {"correction": 0, "keepdim": True})],
)


# ** scans **


def _scan(x: TensorType, where: int, *, dtype: Any = None) -> TensorType:
    axis(where, x.rank)
    return x.with_dtype(dtype or (x.dtype if x.dtype.is_floating_point else torch.int64))


def _axis_ties(out: Any, x: TensorType, where: Any = -1, *rest: Any, **attrs: Any) -> list[Tie]:
    over = axes(where, x.rank)
    if not isinstance(out, tuple):
        return mixed(x, out, over)
    return [
        Tie(t.kind, t.ins, t.outs, result=i) for i, o in enumerate(out) for t in mixed(x, o, over)
    ]


for _name in ("cumsum", "cumprod"):
    aten(
        f"{_name}.default",
        _scan,
        ties=_axis_ties,
        samples=lambda: [
            ((positive(2, 3), -1), {}),
            ((torch.arange(3), 0), {"dtype": torch.int32}),
        ],
    )


# ** order **


def _topk(x: TensorType, k: int, where: int = -1, *rest: Any) -> tuple[TensorType, ...]:
    a = axis(where, x.rank)
    if not isinstance(k, int) or (isinstance(x.shape[a], int) and not 0 <= k <= x.shape[a]):
        raise ModelError(f"expected k of at most {x.shape[a]}, found {k}")
    out = x.with_shape(*x.shape[:a], k, *x.shape[a + 1 :])
    return out, out.with_dtype(torch.int64)


def _topk_ties(out: Any, x: TensorType, k: int, where: int = -1, *rest: Any) -> list[Tie]:
    a = axis(where, x.rank)
    keep = [b for b in range(x.rank) if b != a]
    ties = [Tie("same", ((0, b),), (b,), result=i) for i in range(2) for b in keep]
    places = [Tie("mix", (), (a,), result=i) for i in range(2)]
    return [*ties, Tie("choose", ((0, a),)), *places]


def _sort(x: TensorType, where: int = -1, *rest: Any, **attrs: Any) -> tuple[TensorType, ...]:
    axis(where, x.rank)
    return x, x.with_dtype(torch.int64)


def _stable_sort(x: TensorType, *, dim: int = -1, **attrs: Any) -> tuple[TensorType, ...]:
    return _sort(x, dim)


def _stable_ties(out: Any, x: TensorType, *, dim: int = -1, **attrs: Any) -> list[Tie]:
    return _axis_ties(out, x, dim)


def _argsort(x: TensorType, where: int = -1, *rest: Any, **attrs: Any) -> TensorType:
    axis(where, x.rank)
    return x.with_dtype(torch.int64)


aten("topk.default", _topk, ties=_topk_ties, samples=lambda: [((randn(2, 5), 2), {})])
aten("sort.default", _sort, ties=_axis_ties, samples=lambda: [((randn(2, 5),), {})])
aten(
    "sort.stable",
    _stable_sort,
    ties=_stable_ties,
    samples=lambda: [((randn(2, 5),), {"stable": True, "dim": 0})],
)
aten("argsort.default", _argsort, ties=_axis_ties, samples=lambda: [((randn(2, 5), 0), {})])


def _histc(x: TensorType, bins: int = 100, *rest: Any) -> TensorType:
    if not x.dtype.is_floating_point or not isinstance(bins, int):
        raise ModelError(f"expected floats and a literal number of bins, found {x} and {bins}")
    return x.with_shape(bins)


aten(
    "histc.default",
    _histc,
    ties=lambda out, x, *r, **a: [Tie("mix", tuple((0, i) for i in range(x.rank)), (0,))],
    samples=lambda: [((torch.tensor([0.0, 1.0, 1.0, 3.0]), 4, 0, 3), {})],
)


def _one_hot(x: TensorType, classes: int = -1) -> TensorType:
    if not isinstance(classes, int) or classes < 1:
        raise ModelError(f"expected a literal number of classes, found {classes}")
    if x.dtype != torch.int64:
        raise ModelError(f"expected i64 classes, found {x}")
    return x.with_shape(*x.shape, classes)


def _one_hot_ties(out: TensorType, x: TensorType, classes: int) -> list[Tie]:
    return [*kept(range(x.rank), range(x.rank)), Tie("mix", (), (x.rank,))]


aten(
    "one_hot.default",
    _one_hot,
    ties=_one_hot_ties,
    samples=lambda: [((torch.tensor([[0, 2], [1, 1]]), 3), {})],
)


def _diff(x: TensorType, n: int = 1, where: int = -1, *rest: Any) -> TensorType:
    a = axis(where, x.rank)
    extra = sum(t.shape[a] for t in rest if isinstance(t, TensorType))
    size = x.shape[a] + extra - n
    if not isinstance(size, int) and same(size, 0):
        raise ModelError(f"expected more than {n} entries, found {x}")
    return x.with_shape(*x.shape[:a], size, *x.shape[a + 1 :])


def _diff_ties(
    out: TensorType, x: TensorType, n: int = 1, where: int = -1, *rest: Any
) -> list[Tie]:
    return _axis_ties(out, x, where)


aten("diff.default", _diff, ties=_diff_ties, samples=lambda: [((randn(2, 5),), {})])
