"""What the aten rows share: broadcasting, torch's dtype promotion, tie builders, samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..dims import Dim, Shape, dim, divide, numel, same
from ..errors import ModelError
from ..types import SymType, TensorType
from .base import Tie, as_dim

# A literal size above this is refused before anything is allocated.
MAX_ELEMENTS = 1 << 31

Samples = list[tuple[tuple[Any, ...], dict[str, Any]]]


def flat(args: Iterable[Any]) -> list[Any]:
    """Arguments with lists and tuples opened: the numbering that ties use."""
    out: list[Any] = []
    for a in args:
        out.extend(a) if isinstance(a, (list, tuple)) else out.append(a)
    return out


def axis(value: Any, rank: int) -> int:
    """An axis counted from the front.

    Raises:
        ModelError: out of range.
    """
    if not isinstance(value, int) or not -rank <= value < max(rank, 1):
        raise ModelError(f"expected an axis below rank {rank}, found {value}")
    return value % max(rank, 1)


def axes(values: Any, rank: int) -> tuple[int, ...]:
    """Axes counted from the front; None or an empty list means all."""
    if values is None or values == [] or values == ():
        return tuple(range(rank))
    many = values if isinstance(values, (list, tuple)) else [values]
    return tuple(axis(v, rank) for v in many)


def broadcast(*shapes: Shape) -> Shape:
    """The shape that torch broadcasts to; dims that are not 1 must be provably equal.

    Raises:
        ModelError: two dims that cannot be proved equal.
    """
    rank = max((len(s) for s in shapes), default=0)
    out: list[Dim] = []
    for a in range(rank):
        found: Dim = 1
        for s in shapes:
            i = a - (rank - len(s))
            if i < 0 or s[i] == 1:
                continue
            if found == 1:
                found = s[i]
            elif not same(found, s[i]):
                raise ModelError(f"expected shapes that broadcast, found {found} against {s[i]}")
        out.append(found)
    return tuple(out)


def promote(*values: Any) -> torch.dtype:
    """The dtype of arithmetic by torch's rules: tensors of rank 0 and numbers weigh less.

    Raises:
        ModelError: no tensor and no number among the values.
    """
    probes: list[Any] = []
    for v in values:
        if isinstance(v, TensorType):
            probes.append(torch.empty((1,) * min(v.rank, 1), dtype=v.dtype, device="meta"))
        elif isinstance(v, SymType):
            probes.append(1)
        elif isinstance(v, (bool, int, float)):
            probes.append(v)
    state: Any = None
    for p in probes:
        state = p if state is None else _join(state, p)
    if isinstance(state, torch.Tensor):
        return state.dtype
    if state is None:
        raise ModelError("expected a tensor or a number, found none")
    return torch.result_type(state, state)


def _join(a: Any, b: Any) -> Any:
    dtype = torch.result_type(a, b)
    ranks = [p.dim() for p in (a, b) if isinstance(p, torch.Tensor)]
    return torch.empty((1,) * max(ranks, default=0), dtype=dtype, device="meta")


def to_float(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a function such as exp: floats stay, integers become the default float."""
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def one_dtype(*types: TensorType | None) -> torch.dtype:
    """The common dtype of arguments that torch does not promote (linear, matmul).

    Raises:
        ModelError: two dtypes.
    """
    found = [t.dtype for t in types if t is not None]
    if any(d != found[0] for d in found):
        raise ModelError(f"expected arguments of one dtype, found {[str(d) for d in found]}")
    return found[0]


def shape_from(sizes: Any) -> Shape:
    """Dims from a literal size list of ints and symbolic integers.

    Raises:
        ModelError: a negative size, or more than 2**31 elements in the literal part.
    """
    shape = tuple(as_dim(s) for s in sizes)
    literal = 1
    for d in shape:
        if isinstance(d, int):
            if d < 0:
                raise ModelError(f"expected sizes of at least 0, found {d}")
            literal *= max(d, 1)
    if literal > MAX_ELEMENTS:
        raise ModelError(f"expected at most {MAX_ELEMENTS} elements, found {literal}")
    return shape


def resize(shape: Shape, sizes: Any) -> Shape:
    """The target of a view: -1 is what is left, and the element count must provably stay.

    Raises:
        ModelError: it does not.
    """
    target = [-1 if s == -1 else as_dim(s) for s in sizes]
    total = numel(shape)
    holes = [i for i, d in enumerate(target) if isinstance(d, int) and d == -1]
    if len(holes) > 1:
        raise ModelError(f"expected at most one -1, found sizes {list(sizes)}")
    if holes:
        rest = numel(d for i, d in enumerate(target) if i != holes[0])
        left = divide(total, rest)
        if left is None:
            raise ModelError(f"expected {rest} to divide {total} elements, found no proof")
        target[holes[0]] = left
    out = tuple(dim(d) for d in target)
    if not same(numel(out), total):
        raise ModelError(f"expected a view of {total} elements, found {numel(out)}")
    return out


# ** ties **


def broadcast_ties(out: TensorType, *args: Any, **attrs: Any) -> list[Tie]:
    """Each axis of the result is the same dim of every argument that is not broadcast there."""
    ties: list[Tie] = []
    values = flat(args)
    for a in range(out.rank):
        ins = []
        for i, t in enumerate(values):
            if isinstance(t, TensorType):
                b = a - (out.rank - t.rank)
                if b >= 0 and (t.shape[b] != 1 or out.shape[a] == 1):
                    ins.append((i, b))
        if ins:
            ties.append(Tie("same", tuple(ins), (a,)))
    return ties


def kept(ins: Sequence[int], outs: Sequence[int], arg: int = 0) -> list[Tie]:
    """``same`` ties between pairs of axes of one argument and of the result."""
    return [Tie("same", ((arg, i),), (o,)) for i, o in zip(ins, outs, strict=True)]


def factor_ties(before: Shape, after: Shape) -> list[Tie]:
    """Ties of a reshape, left to right: the shortest runs of axes with equal products.

    One axis to one is ``same``, to many ``split``, many to one ``merge``; a run without such a
    form is ``mix``. Axes of size 1 come and go freely.
    """
    left = [a for a, d in enumerate(before) if d != 1]
    right = [a for a, d in enumerate(after) if d != 1]
    ties: list[Tie] = []
    i = j = 0
    while i < len(left) and j < len(right):
        ins, outs = [left[i]], [right[j]]
        p, q = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while not same(p, q):
            if j < len(right) and (i == len(left) or divide(p, q) is not None):
                outs.append(right[j])
                q, j = dim(q * after[right[j]]), j + 1
            elif i < len(left):
                ins.append(left[i])
                p, i = dim(p * before[left[i]]), i + 1
            else:
                break
        pairs = tuple((0, a) for a in ins)
        if len(ins) == 1:
            ties.append(Tie("same" if len(outs) == 1 else "split", pairs, tuple(outs)))
        else:
            ties.append(Tie("merge" if len(outs) == 1 else "mix", pairs, tuple(outs)))
    return ties


def mixed(x: TensorType, out: TensorType, over: Sequence[int]) -> list[Tie]:
    """Same shape, the axes in ``over`` mixed and the others kept."""
    rest = [a for a in range(x.rank) if a not in over]
    return kept(rest, rest) + [Tie("mix", ((0, a),), (a,)) for a in over]


# ** samples **


def randn(*shape: int) -> torch.Tensor:
    """A repeatable fp64 sample."""
    g = torch.Generator().manual_seed(sum(shape) + 31 * len(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def positive(*shape: int) -> torch.Tensor:
    """A repeatable fp64 sample above 1/2."""
    return randn(*shape).abs() + 0.5
