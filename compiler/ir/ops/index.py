"""Rows of the aten ops that read or write by index."""

from __future__ import annotations

from typing import Any

import torch

from ..dims import Dim, same, same_shape
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, aten
from .rules import axis, broadcast, kept, randn


def _integers(*types: TensorType) -> None:
    for t in types:
        if t.dtype not in (torch.int64, torch.int32):
            raise ModelError(f"expected an integer index, found {t}")


def _used(x: TensorType, indices: Any) -> list[int]:
    """The axes of ``x`` that an index list reads.

    Raises:
        ModelError: a bool mask (its result has a size that depends on data), or too many.
    """
    found = [a for a, i in enumerate(indices) if i is not None]
    if not found or len(indices) > x.rank:
        raise ModelError(f"expected 1 to {x.rank} indices, found {len(indices)}")
    _integers(*(indices[a] for a in found))
    return found


def _plan(x: TensorType, indices: Any) -> tuple[list[int], tuple[Dim, ...], int]:
    """(indexed axes, shape of the index, where that shape lands in the result)."""
    used = _used(x, indices)
    shape = broadcast(*(indices[a].shape for a in used))
    together = used[-1] - used[0] + 1 == len(used)
    return used, shape, used[0] if together else 0


def _index(x: TensorType, indices: Any) -> TensorType:
    used, shape, at = _plan(x, indices)
    rest = [d for a, d in enumerate(x.shape) if a not in used]
    return x.with_shape(*rest[:at], *shape, *rest[at:])


def _index_ties(out: TensorType, x: TensorType, indices: Any) -> list[Tie]:
    used, shape, at = _plan(x, indices)
    rest = [a for a in range(x.rank) if a not in used]
    outs = [o if o < at else o + len(shape) for o in range(len(rest))]
    ties = kept(rest, outs)
    for s in range(len(shape)):
        ins = []
        for a in used:
            b = s - (len(shape) - indices[a].rank)
            if b >= 0 and (indices[a].shape[b] != 1 or shape[s] == 1):
                ins.append((1 + a, b))
        ties.append(Tie("same", tuple(ins), (at + s,)))
    return ties + [Tie("mix", ((0, a),)) for a in used]


aten(
    "index.Tensor",
    _index,
    ties=_index_ties,
    samples=lambda: [
        ((randn(3, 4), [torch.tensor([2, 0, 1, 1])]), {}),
        ((randn(2, 3, 4), [None, torch.tensor([[0], [2]]), torch.tensor([1, 3])]), {}),
        ((randn(2, 3, 4), [torch.tensor([1, 0]), None, torch.tensor([3, 0])]), {}),
    ],
)


def _index_put(
    x: TensorType, indices: Any, values: TensorType, accumulate: bool = False
) -> TensorType:
    target = _index(x, indices)
    if values.dtype != x.dtype or not same_shape(
        broadcast(target.shape, values.shape), target.shape
    ):
        raise ModelError(f"expected values that fit {target}, found {values}")
    return x


def _index_put_ties(
    out: TensorType, x: TensorType, indices: Any, values: TensorType, *r: Any
) -> list[Tie]:
    used, shape, at = _plan(x, indices)
    ties = []
    rest = [a for a in range(x.rank) if a not in used]
    lead = len(rest) + len(shape) - values.rank
    for o, a in enumerate(rest):
        ins = [(0, a)]
        b = (o if o < at else o + len(shape)) - lead
        if b >= 0 and values.shape[b] != 1:
            ins.append((1 + len(indices), b))
        ties.append(Tie("same", tuple(ins), (a,)))
    for s in range(len(shape)):
        pairs = [(1 + a, s - (len(shape) - indices[a].rank)) for a in used]
        ins = [(i, b) for i, b in pairs if b >= 0]
        ins += [(1 + len(indices), at + s - lead)] if at + s >= lead else []
        ties.append(Tie("same", tuple(ins)))
    return ties + [Tie("mix", ((0, a),), (a,)) for a in used]


aten(
    "index_put.default",
    _index_put,
    ties=_index_put_ties,
    samples=lambda: [
        ((randn(4), [torch.tensor([2, 0])], randn(2)), {}),
        ((randn(3, 4), [None, torch.tensor([1, 1])], randn(3, 2), True), {}),
    ],
)


def _gather(x: TensorType, where: int, index: TensorType, **attrs: Any) -> TensorType:
    axis(where, x.rank)
    _integers(index)
    if index.rank != x.rank:
        raise ModelError(f"expected an index of rank {x.rank}, found {index}")
    return x.with_shape(*index.shape)


def _gather_ties(
    out: TensorType, x: TensorType, where: int, index: TensorType, **k: Any
) -> list[Tie]:
    a = axis(where, x.rank)
    ties = []
    for b in range(x.rank):
        whole = b != a and same(x.shape[b], index.shape[b])
        ties.append(Tie("same", ((0, b), (2, b)) if whole else ((2, b),), (b,)))
        if not whole:
            ties.append(Tie("pick" if b == a else "mix", ((0, b),), offset=2))
    return ties


aten(
    "gather.default",
    _gather,
    ties=_gather_ties,
    samples=lambda: [((randn(2, 4), 1, torch.tensor([[0, 3], [1, 1]])), {})],
)


def _index_select(x: TensorType, where: int, index: TensorType) -> TensorType:
    a = axis(where, x.rank)
    _integers(index)
    return x.with_shape(*x.shape[:a], index.shape[0], *x.shape[a + 1 :])


def _index_select_ties(out: TensorType, x: TensorType, where: int, index: TensorType) -> list[Tie]:
    a = axis(where, x.rank)
    rest = [b for b in range(x.rank) if b != a]
    return [*kept(rest, rest), Tie("same", ((2, 0),), (a,)), Tie("mix", ((0, a),))]


aten(
    "index_select.default",
    _index_select,
    ties=_index_select_ties,
    samples=lambda: [((randn(2, 4), 1, torch.tensor([3, 0, 0])), {})],
)


def _scatter(x: TensorType, where: int, index: TensorType, source: Any, **attrs: Any) -> TensorType:
    axis(where, x.rank)
    _integers(index)
    if index.rank != x.rank:
        raise ModelError(f"expected an index of rank {x.rank}, found {index}")
    if isinstance(source, TensorType) and (source.dtype != x.dtype or source.rank != x.rank):
        raise ModelError(f"expected a source like {x}, found {source}")
    return x


def _scatter_ties(
    out: TensorType, x: TensorType, where: int, index: TensorType, source: Any, **attrs: Any
) -> list[Tie]:
    a = axis(where, x.rank)
    parts = [(2, index)] + ([(3, source)] if isinstance(source, TensorType) else [])
    ties = []
    for b in range(x.rank):
        whole = b != a and all(same(x.shape[b], t.shape[b]) for _, t in parts)
        if whole:
            ties.append(Tie("same", ((0, b), *((i, b) for i, _ in parts)), (b,)))
        else:
            ties.append(Tie("mix", ((0, b), *((i, b) for i, _ in parts)), (b,)))
    return ties


def _columns() -> torch.Tensor:
    return torch.tensor([[0, 3], [1, 2]])


aten(
    "scatter.src",
    _scatter,
    ties=_scatter_ties,
    samples=lambda: [((randn(2, 4), 1, _columns(), randn(2, 2)), {})],
)
aten(
    "scatter.value",
    _scatter,
    ties=_scatter_ties,
    samples=lambda: [((randn(2, 4), 1, _columns(), 1.5), {})],
)
aten(
    "scatter_add.default",
    _scatter,
    ties=_scatter_ties,
    samples=lambda: [((randn(2, 4), 1, _columns(), randn(2, 2)), {})],
)


def _index_add(
    x: TensorType, where: int, index: TensorType, source: TensorType, **k: Any
) -> TensorType:
    a = axis(where, x.rank)
    _integers(index)
    want = x.with_shape(*x.shape[:a], index.shape[0], *x.shape[a + 1 :])
    if source.dtype != x.dtype or not same_shape(source.shape, want.shape):
        raise ModelError(f"expected a source {want}, found {source}")
    return x


def _index_add_ties(out: TensorType, x: TensorType, where: int, *rest: Any, **k: Any) -> list[Tie]:
    a = axis(where, x.rank)
    ties = [Tie("same", ((0, b), (3, b)), (b,)) for b in range(x.rank) if b != a]
    return [*ties, Tie("same", ((2, 0), (3, a))), Tie("mix", ((0, a),), (a,))]


aten(
    "index_add.default",
    _index_add,
    ties=_index_add_ties,
    samples=lambda: [((randn(2, 4), 1, torch.tensor([3, 3]), randn(2, 2)), {"alpha": 0.5})],
)


def _slice_scatter(
    x: TensorType, source: TensorType, where: int = 0, *ends: Any, **attrs: Any
) -> TensorType:
    if source.dtype != x.dtype or source.rank != x.rank:
        raise ModelError(f"expected a source like {x}, found {source}")
    a = axis(where, x.rank)
    if any(b != a and not same(x.shape[b], source.shape[b]) for b in range(x.rank)):
        raise ModelError(f"expected a source like {x} beside axis {a}, found {source}")
    return x


def _slice_scatter_ties(
    out: TensorType, x: TensorType, source: TensorType, where: int = 0, *ends: Any, **attrs: Any
) -> list[Tie]:
    a = axis(where, x.rank)
    ties = [Tie("same", ((0, b), (1, b)), (b,)) for b in range(x.rank) if b != a]
    return [*ties, Tie("mix", ((0, a), (1, a)), (a,))]


aten(
    "slice_scatter.default",
    _slice_scatter,
    ties=_slice_scatter_ties,
    samples=lambda: [((randn(2, 5), randn(2, 3), 1, 1, 4), {})],
)
