"""Rows of tables that are stored as tensor trains: a lookup and a product, without the table.

A row of the table is ``scale[token]`` times a train of cores G_k: G_1[i₁]·G_2[i₂]·…·G_N[i_N], each
[r_{k-1}, d_k, r_k], as a vector of d₁·…·d_N numbers. Without ``rows`` every token has cores of its
own, i_k = token, and G_k is [V, r_{k-1}, d_k, r_k]. With ``rows`` v₁ … v_N all share them: i_k are
the digits of the token's place among v₁·…·v_N ≥ V, the first the most significant, and G_k is
[v_k, r_{k-1}, d_k, r_k]; ``order`` [V] holds the places, by default the tokens themselves.

Sources: TensorGPT, arXiv 2307.00526; TT-embeddings, arXiv 1901.10787.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..dims import Dim, numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, llmc_op
from .rules import one_dtype

# Rows of the table, and numbers between two cores, that are made at once.
ROWS_AT_ONCE, NUMBERS_AT_ONCE = 4096, 1 << 24


def _width(
    scale: TensorType, order: TensorType | None, cores: Sequence[TensorType], rows: Sequence[int]
) -> int:
    """Numbers in a row of the table.

    Raises:
        ModelError: parts that do not fit.
    """
    if scale.rank != 1 or not isinstance(scale.shape[0], int):
        raise ModelError(f"expected a scale per token [V], found {scale}")
    vocab = scale.shape[0]
    one_dtype(scale, *cores)
    if not cores or any(c.rank != 4 or not all(isinstance(d, int) for d in c.shape) for c in cores):
        raise ModelError(f"expected cores of rank 4, found {[str(c) for c in cores]}")
    if rows and (len(rows) != len(cores) or min(rows) < 1 or prod(rows) < vocab):
        raise ModelError(
            f"expected {len(cores)} factors of at least {vocab} rows, found {list(rows)}"
        )
    want = rows or [vocab] * len(cores)
    bonds = [1, *(c.shape[3] for c in cores)]
    for core, count, before in zip(cores, want, bonds, strict=False):
        if core.shape[0] != count or core.shape[1] != before or 0 in core.shape:
            raise ModelError(f"expected a core [{count}, {before}, d, r], found {core}")
    if bonds[-1] != 1:
        raise ModelError(f"expected a last core [.., .., d, 1], found {cores[-1]}")
    if order is not None and (not rows or order.dtype != torch.int32 or order.shape != (vocab,)):
        raise ModelError(f"expected places i32[{vocab}] among shared rows, found {order}")
    return prod(int(str(c.shape[2])) for c in cores)


def _places(ids: Tensor, order: Tensor | None) -> Tensor:
    return ids if order is None else order[ids]


def _digits(places: Tensor, rows: Sequence[int]) -> list[Tensor]:
    out = []
    for k, size in enumerate(rows):
        out.append(places // prod(rows[k + 1 :]) % size)
    return out


def _decode(places: Tensor, cores: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Unscaled rows [T, H] of places, int [T]; only their slices of the cores are read."""
    index = _digits(places, rows) if rows else [places] * len(cores)
    wide = torch.promote_types(torch.float32, cores[0].dtype)
    out = cores[0][index[0]].to(wide).flatten(1, 2)
    for core, at in zip(cores[1:], index[1:], strict=True):
        part = core[at].to(wide)
        out = (out @ part.flatten(2)).reshape(len(places), -1, part.shape[3])
    return out.flatten(1)


def tt_lookup(
    ids: Tensor, scale: Tensor, order: Tensor | None, cores: Sequence[Tensor], *,
    rows: Sequence[int],
) -> Tensor:  # fmt: skip
    """Rows of the table for ``ids``, [..., H]; the cores of no other token are read.

    Args:
        ids: int [...]; scale: [V]; order: int32 [V] or None; cores, rows: see the module.
    """
    flat = ids.flatten()
    # A selection, unlike an index, takes no token below 0 for one from the end.
    sizes = scale.index_select(0, flat)[:, None]
    out = _decode(_places(flat, order).long(), cores, rows) * sizes
    return out.to(scale.dtype).reshape(*ids.shape, -1)


def _lookup_type(
    ids: TensorType, scale: TensorType, order: TensorType | None, cores: Sequence[TensorType], *,
    rows: Sequence[int],
) -> TensorType:  # fmt: skip
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ModelError(f"expected integer ids, found {ids}")
    return scale.with_shape(*ids.shape, _width(scale, order, cores, rows))


def tt_linear(
    x: Tensor, scale: Tensor, order: Tensor | None, cores: Sequence[Tensor], *, rows: Sequence[int]
) -> Tensor:
    """x [..., H] times the table's transpose, [..., V].

    Few tokens are contracted with one shared core after the other; for many, or where each token of
    the vocabulary has its own cores, some rows of the table are made at a time and multiplied.
    """
    wide = torch.promote_types(torch.float32, x.dtype)
    flat = x.flatten(0, -2).to(wide)
    vocab = len(scale)
    if rows and len(flat) <= cores[-1].shape[2]:
        per = max(_between(cores))
        step = max(1, NUMBERS_AT_ONCE // per)
        made = [_contract(part, cores) for part in flat.split(step)]
        out = torch.cat(made) if len(made) != 1 else made[0]
        out = out[:, :vocab] if order is None else out[:, order.long()]
    else:
        places = _places(torch.arange(vocab, device=x.device), order).long()
        parts = [flat @ _decode(p, cores, rows).t() for p in places.split(ROWS_AT_ONCE)]
        out = torch.cat(parts, 1)
    return (out * scale).to(x.dtype).reshape(*x.shape[:-1], vocab)


def _between(cores: Sequence[Any]) -> list[int]:
    """Numbers per token behind each core when x is contracted with them."""
    made, rest = 1, prod(int(c.shape[2]) for c in cores)
    out = []
    for core in cores:
        made, rest = made * int(core.shape[0]), rest // int(core.shape[2])
        out.append(made * int(core.shape[3]) * rest)
    return out


def _contract(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x [T, H] against every place of shared cores: [T, v₁·…·v_N]."""
    out = x.reshape(len(x), 1, 1, -1)
    for core in cores:
        count, before, size, after = core.shape
        split = out.reshape(len(x), -1, before * size, out.shape[-1] // size)
        matrix = core.to(x.dtype).permute(0, 3, 1, 2).reshape(count * after, before * size)
        out = (matrix @ split).reshape(len(x), -1, count, after, split.shape[-1])
        out = out.flatten(1, 2)
    return out.reshape(len(x), -1)


def _linear_type(
    x: TensorType, scale: TensorType, order: TensorType | None, cores: Sequence[TensorType], *,
    rows: Sequence[int],
) -> TensorType:  # fmt: skip
    width = _width(scale, order, cores, rows)
    if x.rank < 1 or not same(x.shape[-1], width):
        raise ModelError(f"expected x [..., {width}], found {x}")
    return x.with_shape(*x.shape[:-1], scale.shape[0]).with_dtype(one_dtype(x, scale))


def _table_ties(out: TensorType, *types: Any) -> list[Tie]:
    """Ties of scale, order and cores, arguments 1 …: no axis of the table can be cut."""
    scale, order, cores = types
    parts = [scale, order, *cores]
    axes = [(1 + i, a) for i, t in enumerate(parts) if t is not None for a in range(t.rank)]
    return [Tie("mix", tuple(axes), (out.rank - 1,))]


def _lookup_ties(out: TensorType, ids: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    return [*(Tie("same", ((0, a),), (a,)) for a in range(ids.rank)), *_table_ties(out, *types)]


def _linear_ties(out: TensorType, x: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    last = x.rank - 1
    return [
        *(Tie("same", ((0, a),), (a,)) for a in range(last)),
        Tie("mix", ((0, last),)),
        *_table_ties(out, *types),
    ]


def _decode_flops(cores: Sequence[TensorType]) -> int:
    """Operations that one row takes."""
    made, out = 1, 0
    for core in cores:
        _, before, size, after = (int(str(d)) for d in core.shape)
        out += 2 * made * before * size * after if made > 1 else 0
        made *= size
    return out


def _lookup_flops(out: TensorType, ids: TensorType, scale: Any, order: Any, cores: Any,
                  **attrs: Any) -> Dim:  # fmt: skip
    return numel(ids.shape) * (_decode_flops(cores) + prod(int(str(c.shape[2])) for c in cores))


def _linear_flops(out: TensorType, x: TensorType, scale: TensorType, order: Any, cores: Any,
                  **attrs: Any) -> Dim:  # fmt: skip
    return scale.shape[0] * _decode_flops(cores) + 2 * numel(x.shape) * scale.shape[0]


def _samples(of_ids: bool) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = torch.tensor([[0, 4, 2], [1, 1, 3]]) if of_ids else make(2, 3, 6)
    few = torch.tensor([3]) if of_ids else make(1, 6)
    own = [make(5, 1, 2, 2), make(5, 2, 3, 1)]
    shared = [make(2, 1, 2, 2), make(3, 2, 3, 1)]
    order = torch.tensor([5, 0, 3, 1, 2], dtype=torch.int32)
    return [
        ((x, make(5), None, own), {"rows": []}),
        ((x, make(5), order, shared), {"rows": [2, 3]}),
        ((few, make(5), order, shared), {"rows": [2, 3]}),
        ((few, make(6), None, shared), {"rows": [2, 3]}),
    ]


llmc_op(
    "tt_lookup",
    "(Tensor ids, Tensor scale, Tensor? order, Tensor[] cores, *, int[] rows) -> Tensor",
    _lookup_type,
    tt_lookup,
    ties=_lookup_ties,
    flops=_lookup_flops,
    samples=lambda: _samples(True),
)
llmc_op(
    "tt_linear",
    "(Tensor x, Tensor scale, Tensor? order, Tensor[] cores, *, int[] rows) -> Tensor",
    _linear_type,
    tt_linear,
    ties=_linear_ties,
    flops=_linear_flops,
    samples=lambda: _samples(False),
)
