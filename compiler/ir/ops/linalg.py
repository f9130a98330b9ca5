"""Rows of the aten matrix products, embedding, normalisation and whole attention."""

from __future__ import annotations

from typing import Any

import torch

from ..dims import Dim, divide, numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, aten
from .rules import axes, broadcast, broadcast_ties, one_dtype, positive, randn


def _meet(a: Dim, b: Dim, what: str) -> None:
    if not same(a, b):
        raise ModelError(f"expected {what} of one inner size, found {a} and {b}")


# ** linear **


def _linear(x: TensorType, w: TensorType, bias: TensorType | None = None) -> TensorType:
    if w.rank != 2:
        raise ModelError(f"expected a weight [N, K], found {w}")
    _meet(x.shape[-1], w.shape[1], "x and weight")
    if bias is not None and not (bias.rank == 1 and same(bias.shape[0], w.shape[0])):
        raise ModelError(f"expected a bias [{w.shape[0]}], found {bias}")
    return TensorType((*x.shape[:-1], w.shape[0]), one_dtype(x, w, bias))


def _linear_ties(
    out: TensorType, x: TensorType, w: TensorType, bias: TensorType | None = None
) -> list[Tie]:
    last = out.rank - 1
    rows = ((1, 0), (2, 0)) if bias is not None else ((1, 0),)
    return [
        *(Tie("same", ((0, a),), (a,)) for a in range(last)),
        Tie("contract", ((0, last), (1, 1))),
        Tie("same", rows, (last,)),
    ]


def _inner_flops(out: TensorType, x: TensorType, *rest: Any, **attrs: Any) -> Dim:
    return 2 * numel(out.shape) * x.shape[-1]


def _bias_first_flops(out: TensorType, bias: Any, x: TensorType, *rest: Any, **attrs: Any) -> Dim:
    return 2 * numel(out.shape) * x.shape[-1]


aten(
    "linear.default",
    _linear,
    ties=_linear_ties,
    flops=_inner_flops,
    samples=lambda: [
        ((randn(2, 3, 4), randn(5, 4), randn(5)), {}),
        ((randn(2, 4), randn(5, 4)), {}),
        ((randn(4), randn(5, 4)), {}),
    ],
)


# ** matrix products **


def _matmul(a: TensorType, b: TensorType) -> TensorType:
    if not a.rank or not b.rank:
        raise ModelError(f"expected tensors of rank 1 or more, found {a} and {b}")
    _meet(a.shape[-1], b.shape[max(b.rank - 2, 0)], "factors")
    lead = broadcast(a.shape[:-2], b.shape[:-2])
    tail = a.shape[-2:-1] + (b.shape[-1:] if b.rank > 1 else ())
    return TensorType((*lead, *tail), one_dtype(a, b))


def _matmul_ties(out: TensorType, a: TensorType, b: TensorType) -> list[Tie]:
    lead = len(broadcast(a.shape[:-2], b.shape[:-2]))
    ties: list[Tie] = []
    for axis in range(lead):
        ins = []
        for i, t in ((0, a), (1, b)):
            at = axis - (lead - (t.rank - 2))
            if t.rank > 2 and at >= 0 and (t.shape[at] != 1 or out.shape[axis] == 1):
                ins.append((i, at))
        ties.append(Tie("same", tuple(ins), (axis,)))
    ties.append(Tie("contract", ((0, a.rank - 1), (1, max(b.rank - 2, 0)))))
    if a.rank > 1:
        ties.append(Tie("same", ((0, a.rank - 2),), (lead,)))
    if b.rank > 1:
        ties.append(Tie("same", ((1, b.rank - 1),), (out.rank - 1,)))
    return ties


def _ranked(rank: int) -> Any:
    def infer(a: TensorType, b: TensorType) -> TensorType:
        if a.rank != rank or b.rank != rank:
            raise ModelError(f"expected tensors of rank {rank}, found {a} and {b}")
        if rank == 3:
            _meet(a.shape[0], b.shape[0], "batches")
        return _matmul(a, b)

    return infer


aten(
    "matmul.default",
    _matmul,
    ties=_matmul_ties,
    flops=_inner_flops,
    samples=lambda: [
        ((randn(2, 3, 4), randn(4, 5)), {}),
        ((randn(2, 1, 3, 4), randn(3, 4, 2)), {}),
        ((randn(4), randn(4)), {}),
        ((randn(3, 4), randn(4)), {}),
        ((randn(4), randn(2, 4, 3)), {}),
    ],
)
aten(
    "mm.default",
    _ranked(2),
    ties=_matmul_ties,
    flops=_inner_flops,
    samples=lambda: [((randn(3, 4), randn(4, 5)), {})],
)
aten(
    "bmm.default",
    _ranked(3),
    ties=_matmul_ties,
    flops=_inner_flops,
    samples=lambda: [((randn(2, 3, 4), randn(2, 4, 5)), {})],
)


def _added(c: TensorType, a: TensorType, b: TensorType, **attrs: Any) -> TensorType:
    out = _ranked(a.rank)(a, b)
    if broadcast(c.shape, out.shape) != out.shape:
        raise ModelError(f"expected a summand that broadcasts to {out}, found {c}")
    return TensorType(out.shape, one_dtype(c, a, b))


def _added_ties(
    out: TensorType, c: TensorType, a: TensorType, b: TensorType, **k: Any
) -> list[Tie]:
    product = [
        Tie(t.kind, tuple((i + 1, axis) for i, axis in t.ins), t.outs)
        for t in _matmul_ties(out, a, b)
    ]
    return [*broadcast_ties(out, c), *product]


aten(
    "addmm.default",
    _added,
    ties=_added_ties,
    flops=_bias_first_flops,
    samples=lambda: [
        ((randn(5), randn(3, 4), randn(4, 5)), {}),
        ((randn(3, 5), randn(3, 4), randn(4, 5)), {"beta": 0.5, "alpha": 2.0}),
    ],
)
aten(
    "baddbmm.default",
    _added,
    ties=_added_ties,
    flops=_bias_first_flops,
    samples=lambda: [((randn(2, 3, 5), randn(2, 3, 4), randn(2, 4, 5)), {"alpha": 0.5})],
)


# ** embedding **


def _embedding(w: TensorType, index: TensorType, *rest: Any, **attrs: Any) -> TensorType:
    if w.rank != 2 or index.dtype.is_floating_point:
        raise ModelError(f"expected a weight [V, H] and integer ids, found {w} and {index}")
    return w.with_shape(*index.shape, w.shape[1])


def _embedding_ties(
    out: TensorType, w: TensorType, index: TensorType, *r: Any, **k: Any
) -> list[Tie]:
    return [
        *(Tie("same", ((1, a),), (a,)) for a in range(index.rank)),
        Tie("same", ((0, 1),), (index.rank,)),
        Tie("mix", ((0, 0),)),
    ]


aten(
    "embedding.default",
    _embedding,
    ties=_embedding_ties,
    flops=lambda *types, **attrs: 0,
    samples=lambda: [((randn(3, 4), torch.tensor([[0, 2, 1], [2, 2, 0]])), {})],
)


# ** softmax and normalisation **


def _softmax(x: TensorType, where: int, dtype: Any = None, **attrs: Any) -> TensorType:
    axes(where, x.rank)
    return x.with_dtype(dtype) if isinstance(dtype, torch.dtype) else x


def _softmax_ties(
    out: TensorType, x: TensorType, where: int, *rest: Any, **attrs: Any
) -> list[Tie]:
    over = axes(where, x.rank)
    return [Tie("choose" if a in over else "same", ((0, a),), (a,)) for a in range(x.rank)]


for _name in ("softmax.int", "log_softmax.int"):
    aten(
        _name,
        _softmax,
        ties=_softmax_ties,
        flops=lambda out, *t, **a: 5 * numel(out.shape),
        samples=lambda: [
            ((randn(2, 3, 4), -1), {}),
            ((randn(2, 3).float(), 1, randn(1).dtype), {}),
        ],
    )
for _name in ("_softmax.default", "_log_softmax.default"):
    aten(
        _name,
        _softmax,
        ties=_softmax_ties,
        flops=lambda out, *t, **a: 5 * numel(out.shape),
        samples=lambda: [((randn(2, 3, 4), 1, False), {})],
    )


def _layer_norm(
    x: TensorType, sizes: Any, gain: TensorType | None = None, bias: TensorType | None = None,
    *rest: Any, **attrs: Any,
) -> TensorType:  # fmt: skip
    tail = tuple(sizes)
    have = x.shape[x.rank - len(tail) :]
    if len(tail) > x.rank or not all(same(a, b) for a, b in zip(have, tail, strict=True)):
        raise ModelError(f"expected x[…, {tail}], found {x}")
    for part in (gain, bias):
        if part is not None and part.shape != have:
            raise ModelError(f"expected gain and bias {have}, found {part}")
    return x


def _layer_norm_ties(
    out: TensorType, x: TensorType, sizes: Any, *parts: Any, **attrs: Any
) -> list[Tie]:
    first = x.rank - len(sizes)
    ties = [Tie("same", ((0, a),), (a,)) for a in range(first)]
    for a in range(first, x.rank):
        ins = [(0, a)]
        for i, part in enumerate(parts[:2]):
            if isinstance(part, TensorType):
                ins.append((1 + len(sizes) + i, a - first))
        ties += [Tie("same", tuple(ins), (a,)), Tie("norm", ((0, a),))]
    return ties


def _rms_norm(
    x: TensorType, sizes: Any, gain: TensorType | None = None, *r: Any, **k: Any
) -> TensorType:
    return _layer_norm(x, sizes, gain)


aten(
    "layer_norm.default",
    _layer_norm,
    ties=_layer_norm_ties,
    flops=lambda out, *t, **a: 7 * numel(out.shape),
    samples=lambda: [
        ((randn(2, 3, 4), [4], randn(4), randn(4), 1e-5), {}),
        ((randn(2, 3, 4), [3, 4]), {}),
    ],
)
aten(
    "rms_norm.default",
    _rms_norm,
    ties=lambda out, x, sizes, *parts, **attrs: _layer_norm_ties(out, x, sizes, *parts[:1]),
    flops=lambda out, *t, **a: 4 * numel(out.shape),
    samples=lambda: [((randn(2, 3, 4), [4], positive(4), 1e-5), {}), ((randn(2, 4), [4]), {})],
)


# ** attention that arrives whole **


def _sdpa(q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None = None,
          dropout: float = 0.0, *rest: Any, **attrs: Any) -> TensorType:  # fmt: skip
    if dropout:
        raise ModelError(f"expected attention without dropout, found p={dropout}")
    if q.rank < 3 or not q.rank == k.rank == v.rank:
        raise ModelError(f"expected q, k, v of one rank of at least 3, found {q}, {k}, {v}")
    _meet(q.shape[-1], k.shape[-1], "q and k")
    if not same(k.shape[-2], v.shape[-2]):
        raise ModelError(f"expected k and v of one length, found {k} and {v}")
    lead = q.shape[:-2]
    if attrs.get("enable_gqa"):
        if divide(q.shape[-3], k.shape[-3]) is None:
            raise ModelError(f"expected query heads divisible by key heads, found {q} and {k}")
    else:
        lead = broadcast(lead, k.shape[:-2], v.shape[:-2])
    out = TensorType((*lead, q.shape[-2], v.shape[-1]), one_dtype(q, k, v))
    if mask is not None:
        broadcast((*lead, q.shape[-2], k.shape[-2]), mask.shape)
    return out


def _sdpa_ties(out: TensorType, q: TensorType, k: TensorType, v: TensorType, *rest: Any,
               **attrs: Any) -> list[Tie]:  # fmt: skip
    ties: list[Tie] = []
    n = out.rank
    for a in range(n - 2):
        ins = [(0, a)] if q.shape[a] != 1 or out.shape[a] == 1 else []
        for i, t in ((1, k), (2, v)):
            factor = divide(out.shape[a], t.shape[a])
            if same(t.shape[a], out.shape[a]):
                ins.append((i, a))
            elif attrs.get("enable_gqa") and factor is not None:
                ties.append(Tie("repeat", ((i, a),), (a,), factor=factor))
        ties.append(Tie("same", tuple(ins), (a,)))
    ties += [
        Tie("same", ((0, n - 2),), (n - 2,)),
        Tie("mix", ((1, n - 2), (2, n - 2))),
        Tie("contract", ((0, n - 1), (1, n - 1))),
        Tie("same", ((2, n - 1),), (n - 1,)),
    ]
    if rest and isinstance(rest[0], TensorType):
        m = rest[0]
        for a in range(n - 1):
            at = a - (n - m.rank)
            if at >= 0 and m.shape[at] != 1:
                ties.append(Tie("same", ((3, at),), (a,)))
        if m.shape[-1] != 1:
            ties.append(Tie("mix", ((3, m.rank - 1),)))
    return ties


def _sdpa_flops(out: TensorType, q: TensorType, k: TensorType, *rest: Any, **attrs: Any) -> Dim:
    return 2 * numel(out.shape[:-1]) * k.shape[-2] * (q.shape[-1] + out.shape[-1])


aten(
    "scaled_dot_product_attention.default",
    _sdpa,
    ties=_sdpa_ties,
    flops=_sdpa_flops,
    samples=lambda: [
        ((randn(2, 2, 3, 4), randn(2, 2, 5, 4), randn(2, 2, 5, 3)), {"scale": 0.5}),
        ((randn(2, 2, 3, 4), randn(2, 1, 3, 4), randn(2, 1, 3, 4), randn(3, 3)), {}),
        (
            (randn(2, 4, 3, 4), randn(2, 2, 3, 4), randn(2, 2, 3, 4), None, 0.0, True),
            {"enable_gqa": True},
        ),
    ],
)
