"""Rows of the aten ops that cut tensors into pieces and join pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..dims import Dim, dim, same, same_shape
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, as_dim, aten
from .resize import Resize, chunked, sliced, split_evenly, split_into
from .rules import Samples, axis, kept, one_dtype, promote, randn

# What torch writes for "to the end" in a slice.
_END = 1 << 62


def _row(
    name: str, infer: Callable[..., Any], ties: Any, samples: Callable[[], Samples],
    resize: Resize | None = None,
) -> None:  # fmt: skip
    aten(name, infer, ties=ties, flops=lambda *types, **attrs: 0, samples=samples, resize=resize)


# ** cut **


def _bound(value: Any, size: Dim, default: Dim) -> Dim:
    """One end of a slice as a position; a symbolic end is taken to lie inside, as export guards."""
    if value is None:
        return default
    at = as_dim(value)
    if not isinstance(at, int):
        return at
    if at >= _END:
        return size
    if at < 0:
        return max(size + at, 0) if isinstance(size, int) else dim(size + at)
    return min(at, size) if isinstance(size, int) else at


def _span(
    x: TensorType, where: int, start: Any = None, end: Any = None, step: int = 1
) -> tuple[int, Dim, Dim]:
    a = axis(where, x.rank)
    low, high = _bound(start, x.shape[a], 0), _bound(end, x.shape[a], x.shape[a])
    size = dim(high - low)
    if step != 1:
        if not isinstance(size, int):
            raise ModelError(f"expected a literal length for step {step}, found {size}")
        size = math.ceil(size / step)
    return a, low, max(size, 0) if isinstance(size, int) else size


def _slice(x: TensorType, where: int = 0, *ends: Any, **attrs: Any) -> TensorType:
    a, _, size = _span(x, where, *ends, **attrs)
    return x.with_shape(*x.shape[:a], size, *x.shape[a + 1 :])


def _cut_tie(x: TensorType, a: int, low: Dim, size: Dim, result: int = 0) -> Tie:
    if same(size, x.shape[a]):
        return Tie("same", ((0, a),), (a,), result=result)
    if isinstance(low, int):
        return Tie("slice", ((0, a),), (a,), offset=low, result=result)
    return Tie("mix", ((0, a),), (a,), result=result)


def _slice_ties(
    out: TensorType, x: TensorType, where: int = 0, *ends: Any, **attrs: Any
) -> list[Tie]:
    a, low, size = _span(x, where, *ends, **attrs)
    step = attrs.get("step", ends[2] if len(ends) > 2 else 1)
    rest = [b for b in range(x.rank) if b != a]
    last = _cut_tie(x, a, low, size) if step == 1 else Tie("mix", ((0, a),), (a,))
    return [*kept(rest, rest), last]


def _select(x: TensorType, where: int, index: Any) -> TensorType:
    a, size = axis(where, x.rank), x.shape[axis(where, x.rank)]
    if isinstance(index, int) and isinstance(size, int) and not -size <= index < size:
        raise ModelError(f"expected an index below {size}, found {index}")
    return x.with_shape(*x.shape[:a], *x.shape[a + 1 :])


def _select_ties(out: TensorType, x: TensorType, where: int, index: Any) -> list[Tie]:
    a = axis(where, x.rank)
    rest = [b for b in range(x.rank) if b != a]
    return [*kept(rest, range(len(rest))), Tie("mix", ((0, a),))]


def _pieces(x: TensorType, sizes: Any, where: int = 0) -> tuple[TensorType, ...]:
    a = axis(where, x.rank)
    total = x.shape[a]
    if not isinstance(sizes, (list, tuple)):
        step = as_dim(sizes)
        if not isinstance(step, int) or step < 1:
            raise ModelError(f"expected a piece size of at least 1, found {step}")
        if not isinstance(total, int):
            raise ModelError(f"expected a literal axis to split, found {x}")
        sizes = [min(step, total - at) for at in range(0, total, step)]
    parts = [as_dim(s) for s in sizes]
    if not same(dim(sum(parts)), total):
        raise ModelError(f"expected pieces that sum to {total}, found {parts}")
    return tuple(x.with_shape(*x.shape[:a], p, *x.shape[a + 1 :]) for p in parts)


def _pieces_ties(out: Any, x: TensorType, sizes: Any, where: int = 0) -> list[Tie]:
    a = axis(where, x.rank)
    ties: list[Tie] = []
    low: Dim = 0
    for i, part in enumerate(out):
        for b in range(x.rank):
            if b != a:
                ties.append(Tie("same", ((0, b),), (b,), result=i))
        ties.append(_cut_tie(x, a, low, part.shape[a], result=i))
        low = dim(low + part.shape[a])
    return ties


def _chunk(x: TensorType, chunks: int, where: int = 0) -> tuple[TensorType, ...]:
    size = x.shape[axis(where, x.rank)]
    if not isinstance(size, int):
        raise ModelError(f"expected a literal axis to chunk, found {x}")
    return _pieces(x, math.ceil(size / chunks), where)


def _unbind(x: TensorType, where: int = 0) -> tuple[TensorType, ...]:
    size = x.shape[axis(where, x.rank)]
    if not isinstance(size, int):
        raise ModelError(f"expected a literal axis to unbind, found {x}")
    return tuple(_select(x, where, 0) for _ in range(size))


def _unbind_ties(out: Any, x: TensorType, where: int = 0) -> list[Tie]:
    a = axis(where, x.rank)
    rest = [b for b in range(x.rank) if b != a]
    ties = [
        Tie("same", ((0, b),), (o,), result=i) for i in range(len(out)) for o, b in enumerate(rest)
    ]
    return [*ties, Tie("mix", ((0, a),))]


_row(
    "slice.Tensor",
    _slice,
    _slice_ties,
    lambda: [((randn(4, 6), 1, *w), {}) for w in ((2,), (-3, -1), (1, _END), (0, 6, 4), (4, 2))],
    sliced,
)
_row("select.int", _select, _select_ties, lambda: [((randn(2, 3), 1, -1), {})])
_row("split.Tensor", _pieces, _pieces_ties, lambda: [((randn(2, 7), 3, 1), {})], split_evenly)
_row(
    "split_with_sizes.default",
    _pieces,
    _pieces_ties,
    lambda: [((randn(2, 7), [3, 4], 1), {})],
    split_into,
)
_row("chunk.default", _chunk, _pieces_ties, lambda: [((randn(2, 7), 2, -1), {})], chunked)
_row("unbind.int", _unbind, _unbind_ties, lambda: [((randn(2, 3), 1), {})])


# ** join **


def _cat(parts: Any, where: int = 0) -> TensorType:
    first = parts[0]
    a = axis(where, first.rank)
    for p in parts:
        if p.rank != first.rank or not same_shape(
            p.shape[:a] + p.shape[a + 1 :], first.shape[:a] + first.shape[a + 1 :]
        ):
            raise ModelError(f"expected parts that differ only along axis {a}, found {first}, {p}")
    size = dim(sum(p.shape[a] for p in parts))
    return TensorType((*first.shape[:a], size, *first.shape[a + 1 :]), promote(*parts))


def _cat_ties(out: TensorType, parts: Any, where: int = 0) -> list[Tie]:
    a = axis(where, out.rank)
    ties = [
        Tie("same", tuple((i, b) for i in range(len(parts))), (b,))
        for b in range(out.rank)
        if b != a
    ]
    low: Dim = 0
    for i, p in enumerate(parts):
        if isinstance(low, int):
            ties.append(Tie("concat", ((i, a),), (a,), offset=low))
        else:
            ties.append(Tie("mix", ((i, a),), (a,)))
        low = dim(low + p.shape[a])
    return ties


def _stack(parts: Any, where: int = 0) -> TensorType:
    first = parts[0]
    if not all(same_shape(p.shape, first.shape) for p in parts):
        raise ModelError(f"expected parts of one shape, found {[str(p) for p in parts]}")
    one_dtype(*parts)
    a = axis(where, first.rank + 1)
    return first.with_shape(*first.shape[:a], len(parts), *first.shape[a:])


def _stack_ties(out: TensorType, parts: Any, where: int = 0) -> list[Tie]:
    a = axis(where, out.rank)
    ties = [
        Tie("same", tuple((i, b) for i in range(len(parts))), (b + (b >= a),))
        for b in range(out.rank - 1)
    ]
    return [*ties, Tie("mix", (), (a,))]


_row("cat.default", _cat, _cat_ties, lambda: [(([randn(2, 3), randn(2, 1)], -1), {})])
_row("stack.default", _stack, _stack_ties, lambda: [(([randn(2, 3), randn(2, 3)], 1), {})])
