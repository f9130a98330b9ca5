"""Rows of the aten ops that view, repeat or reorder axes without computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..dims import Dim, dim, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, as_dim, aten
from .resize import Resize, repeated, sizes_at, unflattened
from .rules import (
    Samples,
    axes,
    axis,
    broadcast_ties,
    factor_ties,
    kept,
    randn,
    resize,
    shape_from,
)  # fmt: skip


def _row(
    name: str, infer: Callable[..., Any], ties: Any, samples: Callable[[], Samples],
    resize: Resize | None = None,
) -> None:  # fmt: skip
    aten(name, infer, ties=ties, flops=lambda *types, **attrs: 0, samples=samples, resize=resize)


# ** reshape **


def _view(x: TensorType, sizes: Any, *rest: Any, **attrs: Any) -> TensorType:
    return x.with_shape(*resize(x.shape, sizes))


def _refactor(out: TensorType, x: TensorType, *rest: Any, **attrs: Any) -> list[Tie]:
    return factor_ties(x.shape, out.shape)


def _flatten(x: TensorType, start: int = 0, end: int = -1) -> TensorType:
    a, b = axis(start, x.rank), axis(end, x.rank)
    if a > b:
        raise ModelError(f"expected a first axis up to the last one, found {start} and {end}")
    merged: Dim = 1
    for d in x.shape[a : b + 1]:
        merged = dim(merged * d)
    return x.with_shape(*x.shape[:a], merged, *x.shape[b + 1 :])


def _unflatten(x: TensorType, where: int, sizes: Any) -> TensorType:
    a = axis(where, x.rank)
    return x.with_shape(*x.shape[:a], *resize((x.shape[a],), sizes), *x.shape[a + 1 :])


for _name in ("view", "reshape", "_unsafe_view"):
    _row(
        f"{_name}.default",
        _view,
        _refactor,
        lambda: [((randn(2, 6), [2, 3, -1]), {}), ((randn(2, 3, 4), [6, 2, 2]), {})],
        sizes_at(1),
    )
_row("flatten.using_ints", _flatten, _refactor, lambda: [((randn(2, 3, 4), 1), {})])
_row(
    "unflatten.int",
    _unflatten,
    _refactor,
    lambda: [((randn(2, 6), -1, [3, -1]), {})],
    unflattened,
)


# ** expand, squeeze, permute **


def _expand(x: TensorType, sizes: Any, **attrs: Any) -> TensorType:
    lead = len(sizes) - x.rank
    if lead < 0:
        raise ModelError(f"expected at least {x.rank} sizes, found {list(sizes)}")
    out: list[Dim] = []
    for a, s in enumerate(sizes):
        have = x.shape[a - lead] if a >= lead else 1
        want = have if s == -1 else as_dim(s)
        if have != 1 and not same(have, want):
            raise ModelError(f"expected axis {a} of size {have} or 1, found {want}")
        out.append(want)
    shape_from(out)
    return x.with_shape(*out)


def _expand_ties(out: TensorType, x: TensorType, *rest: Any, **attrs: Any) -> list[Tie]:
    lead = out.rank - x.rank
    same_axes = [a for a in range(x.rank) if x.shape[a] != 1 or out.shape[a + lead] == 1]
    outs = [a + lead for a in same_axes]
    fresh = [a for a in range(out.rank) if a not in outs]
    return [*kept(same_axes, outs), *(Tie("same", (), (a,)) for a in fresh)]


def _expand_as(x: TensorType, other: TensorType) -> TensorType:
    return _expand(x, list(other.shape))


def _repeat(x: TensorType, counts: Any) -> TensorType:
    lead = len(counts) - x.rank
    if lead < 0:
        raise ModelError(f"expected at least {x.rank} counts, found {list(counts)}")
    have = (1,) * lead + x.shape
    return x.with_shape(
        *shape_from([dim(h * as_dim(c)) for h, c in zip(have, counts, strict=True)])
    )


def _repeat_ties(out: TensorType, x: TensorType, counts: Any) -> list[Tie]:
    lead = out.rank - x.rank
    ties: list[Tie] = []
    for a, c in enumerate(counts[lead:]):
        # Whole copies side by side: no index map of a cut, so only a single copy is free.
        kind = "same" if c == 1 else "mix"
        ins = ((0, a),) if c == 1 or x.shape[a] != 1 else ()
        ties.append(Tie(kind if ins else "same", ins, (a + lead,)))
    return [*ties, *(Tie("same", (), (a,)) for a in range(lead))]


def _interleave(x: TensorType, count: int, where: int | None = None, **attrs: Any) -> TensorType:
    if where is None or not isinstance(count, int) or count < 1:
        raise ModelError(f"expected a literal count and an axis, found {count} and {where}")
    a = axis(where, x.rank)
    return x.with_shape(*x.shape[:a], x.shape[a] * count, *x.shape[a + 1 :])


def _interleave_ties(out: TensorType, x: TensorType, count: int, where: int, **a: Any) -> list[Tie]:
    at = axis(where, x.rank)
    rest = [a for a in range(x.rank) if a != at]
    return [*kept(rest, rest), Tie("repeat", ((0, at),), (at,), factor=count)]


def _unsqueeze(x: TensorType, where: int) -> TensorType:
    a = axis(where, x.rank + 1)
    return x.with_shape(*x.shape[:a], 1, *x.shape[a:])


def _unsqueeze_ties(out: TensorType, x: TensorType, where: int) -> list[Tie]:
    a = axis(where, x.rank + 1)
    return kept(range(x.rank), [i + (i >= a) for i in range(x.rank)])


def _squeezed(x: TensorType, where: Any) -> list[int]:
    return [a for a in range(x.rank) if x.shape[a] == 1 and a in axes(where, x.rank)]


def _squeeze(x: TensorType, where: Any = None) -> TensorType:
    gone = _squeezed(x, where)
    return x.with_shape(*(d for a, d in enumerate(x.shape) if a not in gone))


def _squeeze_ties(out: TensorType, x: TensorType, where: Any = None) -> list[Tie]:
    gone = _squeezed(x, where)
    stay = [a for a in range(x.rank) if a not in gone]
    return kept(stay, range(len(stay)))


def _order(x: TensorType, *how: Any) -> list[int]:
    """The source axis of each axis of the result."""
    order = list(range(x.rank))
    if len(how) == 2:
        a, b = axis(how[0], x.rank), axis(how[1], x.rank)
        order[a], order[b] = order[b], order[a]
        return order
    if how:
        found = [axis(a, x.rank) for a in how[0]]
        if sorted(found) != order:
            raise ModelError(f"expected a permutation of {x.rank} axes, found {list(how[0])}")
        return found
    return order[::-1]


def _permute(x: TensorType, *how: Any) -> TensorType:
    return x.with_shape(*(x.shape[a] for a in _order(x, *how)))


def _permute_ties(out: TensorType, x: TensorType, *how: Any) -> list[Tie]:
    return kept(_order(x, *how), range(x.rank))


def _t(x: TensorType) -> TensorType:
    if x.rank > 2:
        raise ModelError(f"expected a tensor of rank 2 or less, found {x}")
    return _permute(x)


_row(
    "expand.default",
    _expand,
    _expand_ties,
    lambda: [((randn(2, 1, 3), [4, 2, 5, -1]), {}), ((randn(1, 3), [2, 3]), {})],
    sizes_at(1),
)
_row("expand_as.default", _expand_as, broadcast_ties, lambda: [((randn(1, 3), randn(2, 3)), {})])
_row(
    "repeat.default",
    _repeat,
    _repeat_ties,
    lambda: [((randn(2, 3), [2, 1, 2]), {}), ((randn(2, 1), [1, 3]), {})],
    repeated,
)
_row(
    "repeat_interleave.self_int", _interleave, _interleave_ties, lambda: [((randn(2, 3), 2, 1), {})]
)
_row(
    "unsqueeze.default",
    _unsqueeze,
    _unsqueeze_ties,
    lambda: [((randn(2, 3), a), {}) for a in (0, -1)],
)
_row("squeeze.default", _squeeze, _squeeze_ties, lambda: [((randn(2, 1, 3, 1),), {})])
_row(
    "squeeze.dim", _squeeze, _squeeze_ties, lambda: [((randn(2, 1, 3, 1), a), {}) for a in (0, -1)]
)
_row("squeeze.dims", _squeeze, _squeeze_ties, lambda: [((randn(2, 1, 3, 1), [0, 1]), {})])
_row("transpose.int", _permute, _permute_ties, lambda: [((randn(2, 3, 4), 1, -1), {})])
_row("permute.default", _permute, _permute_ties, lambda: [((randn(2, 3, 4), [2, 0, 1]), {})])
_row("t.default", _t, _permute_ties, lambda: [((randn(2, 3),), {})])
_row("numpy_T.default", _permute, _permute_ties, lambda: [((randn(2, 3, 4),), {})])


# ** one axis in place **


def _whole(x: TensorType, *rest: Any, **attrs: Any) -> TensorType:
    return x


def _flip_ties(out: TensorType, x: TensorType, where: Any) -> list[Tie]:
    over = axes(where, x.rank)
    return [Tie("mix" if a in over else "same", ((0, a),), (a,)) for a in range(x.rank)]


def _roll_ties(out: TensorType, x: TensorType, shifts: Any, where: Any = ()) -> list[Tie]:
    return _flip_ties(out, x, where)


def _triangle_ties(out: TensorType, x: TensorType, *rest: Any) -> list[Tie]:
    return _flip_ties(out, x, [x.rank - 2, x.rank - 1])


def _pad(x: TensorType, pads: Any, value: Any = 0) -> TensorType:
    shape = list(x.shape)
    for i in range(len(pads) // 2):
        shape[-1 - i] = dim(shape[-1 - i] + as_dim(pads[2 * i]) + as_dim(pads[2 * i + 1]))
    return x.with_shape(*shape)


def _pad_ties(out: TensorType, x: TensorType, pads: Any, value: Any = 0) -> list[Tie]:
    over = [x.rank - 1 - i for i in range(len(pads) // 2)]
    return _flip_ties(out, x, over) if over else kept(range(x.rank), range(x.rank))


_row("flip.default", _whole, _flip_ties, lambda: [((randn(2, 3), [1]), {})])
_row("roll.default", _whole, _roll_ties, lambda: [((randn(2, 3), [1], [1]), {})])
_row("tril.default", _whole, _triangle_ties, lambda: [((randn(3, 3),), {}), ((randn(2, 3), 1), {})])
_row("triu.default", _whole, _triangle_ties, lambda: [((randn(3, 3), 1), {})])
_row("constant_pad_nd.default", _pad, _pad_ties, lambda: [((randn(2, 3), [1, 2], 0.5), {})])
