"""Rows of compressed weights: decode steps that compose, and the fused linear that lowering emits.

Canonical storage (see spec/artefact.md): unsigned codes in dense bit streams, w = (q - zero)·scale.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import packing
from ..dims import Dim, numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, llmc_op


def groups_of(columns: int, group: int) -> int:
    """Number of groups of a row; the last one may be shorter.

    Raises:
        ModelError: a group of nothing.
    """
    if group < 1:
        raise ModelError(f"expected groups of at least one column, found {group}")
    return -(-columns // group)


def _dequantize_type(
    codes: TensorType, scale: TensorType, zero: TensorType | None = None, *, bits: int, group: int,
    columns: int, dtype: torch.dtype = torch.float32,
) -> TensorType:  # fmt: skip
    words, groups = packing.packed_words(columns, bits), groups_of(columns, group)
    if codes.dtype != torch.int32 or not same(codes.shape[-1], words):
        raise ModelError(f"expected codes i32[…, {words}] for {columns} columns, found {codes}")
    for part, name in ((scale, "scale"), (zero, "zero")):
        if part is not None and not (
            same(part.shape[-1], groups) and part.shape[:-1] == codes.shape[:-1]
        ):
            raise ModelError(f"expected {name} […, {groups}] beside {codes}, found {part}")
    return TensorType((*codes.shape[:-1], columns), dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, *, bits: int,
    group: int, columns: int, dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """(q - zero)·scale per group of ``group`` columns.

    Args:
        codes: int32 [..., N, words], packed rows.
        scale: [..., N, G]; zero: uint8 [..., N, G], None means 2**(bits-1).
    Returns:
        [..., N, columns] in ``dtype``; computed in fp32, so code and scale give one weight exactly.
    """
    q = packing.unpack(codes, bits, columns).to(torch.float32)
    which = torch.arange(columns, device=codes.device) // group
    offset = zero.to(torch.float32)[..., which] if zero is not None else float(1 << (bits - 1))
    wide = torch.promote_types(torch.float32, scale.dtype)
    return ((q - offset) * scale.to(wide)[..., which]).to(dtype)


def _rows_same(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    """Rows are rows of every part; within a row packed words cannot be cut."""
    last = out.rank - 1
    parts = [i for i, t in enumerate(types) if isinstance(t, TensorType)]
    ties = [Tie("same", tuple((i, a) for i in parts), (a,)) for a in range(last)]
    return [*ties, Tie("mix", tuple((i, last) for i in parts), (last,))]


def _codes_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (3, 8), generator=g)
    scale = torch.rand(3, 2, generator=g, dtype=torch.float64)
    attrs = {"bits": 4, "group": 4, "columns": 8, "dtype": torch.float64}
    return [((packing.pack(q, 4), scale), attrs)]


llmc_op(
    "dequantize",
    "(Tensor codes, Tensor scale, Tensor? zero=None, *, int bits, int group, int columns, "
    "ScalarType dtype=float) -> Tensor",
    _dequantize_type,
    dequantize,
    ties=_rows_same,
    samples=_codes_sample,
)


def _expand_nm_type(
    values: TensorType, meta: TensorType, *, n: int, m: int, columns: int
) -> TensorType:
    kept = columns // m * n
    words = packing.packed_words(kept, packing.nm_bits(m))
    if columns % m or not same(values.shape[-1], kept):
        raise ModelError(f"expected {kept} kept of {columns} columns at {n}:{m}, found {values}")
    if meta.dtype != torch.int32 or not same(meta.shape[-1], words):
        raise ModelError(f"expected mask positions i32[…, {words}], found {meta}")
    return TensorType((*values.shape[:-1], columns), values.dtype)


def _expand_nm(
    values: torch.Tensor, meta: torch.Tensor, *, n: int, m: int, columns: int
) -> torch.Tensor:
    """Kept values [..., N, K*n/m] and their positions -> [..., N, K], zeros elsewhere."""
    return packing.expand_nm(values, meta, n, m, columns)


def _nm_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, generator=g, dtype=torch.float64)
    where = torch.tensor([[0, 3, 1, 2], [0, 1, 2, 3], [1, 3, 0, 2]])
    return [((values, packing.pack(where, 2)), {"n": 2, "m": 4, "columns": 8})]


llmc_op(
    "expand_nm",
    "(Tensor values, Tensor meta, *, int n, int m, int columns) -> Tensor",
    _expand_nm_type,
    _expand_nm,
    ties=_rows_same,
    samples=_nm_sample,
)


def _expand_bitmap_type(values: TensorType, bitmap: TensorType, *, columns: int) -> TensorType:
    words = packing.packed_words(columns, 1)
    if values.rank != 1 or bitmap.dtype != torch.int32 or not same(bitmap.shape[-1], words):
        raise ModelError(
            f"expected flat values and bitmap i32[…, {words}], found {values}, {bitmap}"
        )
    return TensorType((*bitmap.shape[:-1], columns), values.dtype)


def _expand_bitmap(values: torch.Tensor, bitmap: torch.Tensor, *, columns: int) -> torch.Tensor:
    """Flat kept values [nnz], row-major, and one bit per weight -> [..., N, K].

    Raises:
        IndexError: fewer values than bits.
    """
    mask = packing.unpack(bitmap, 1, columns).bool()
    try:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)
    except RuntimeError as e:
        # Torch counts the bits anyway, so nothing is counted here before.
        raise IndexError(f"{len(values)} values for the bits of a mask: {e}") from e


def _bitmap_ties(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    # The values lie in row order, so that no row can go without counting the bits before it.
    return [Tie("mix", ((0, 0), *((1, a) for a in range(out.rank))), tuple(range(out.rank)))]


def _bitmap_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    return [((values, packing.pack(mask, 1)), {"columns": 5})]


llmc_op(
    "expand_bitmap",
    "(Tensor values, Tensor bitmap, *, int columns) -> Tensor",
    _expand_bitmap_type,
    _expand_bitmap,
    ties=_bitmap_ties,
    samples=_bitmap_sample,
)


def _fused_type(
    x: TensorType, codes: TensorType, scale: TensorType, zero: TensorType | None = None,
    meta: TensorType | None = None, bias: TensorType | None = None,
    residual: TensorType | None = None, gain: TensorType | None = None,
    left: TensorType | None = None, right: TensorType | None = None, *, bits: int, group: int,
    columns: int, n: int = 0, m: int = 0, eps: float = 0.0,
) -> TensorType:  # fmt: skip
    kept = columns // m * n if m else columns
    inner = _dequantize_type(codes, scale, zero, bits=bits, group=group, columns=kept)
    if m:
        if meta is None:
            raise ModelError(f"expected mask positions for {n}:{m}, found none")
        _expand_nm_type(inner, meta, n=n, m=m, columns=columns)
    if not same(x.shape[-1], columns):
        raise ModelError(f"expected x[…, {columns}], found {x}")
    out = x.with_shape(*x.shape[:-1], codes.shape[0])
    if residual is not None and residual.shape != out.shape:
        raise ModelError(f"expected a residual like {out}, found {residual}")
    if (left is None) != (right is None):
        raise ModelError("expected both factors of a product of low rank, found one")
    if left is not None and right is not None:
        fits = left.rank == right.rank == 2 and same(left.shape[1], right.shape[0])
        if not (fits and same(left.shape[0], codes.shape[0]) and same(right.shape[1], columns)):
            raise ModelError(
                f"expected factors of {out.shape[-1]} x {columns}, found {left}, {right}"
            )
    return out


def fused_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None,
    meta: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, gain: torch.Tensor | None = None,
    left: torch.Tensor | None = None, right: torch.Tensor | None = None, *, bits: int,
    group: int, columns: int, n: int = 0, m: int = 0, eps: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """y = h · Wᵀ + (h · rightᵀ) · leftᵀ + bias + residual, h = norm(x), W decoded from its codes.

    Args:
        x: [..., K]; with ``gain`` [K] the input is rms_norm(x; eps)·gain, else x itself.
        codes, scale, zero: as in ``dequantize``, over the kept columns when ``m`` is set.
        meta: positions of the kept values of an n:m mask.
        bias: [N]; residual: [..., N]; left: [N, R]; right: [R, K].
    """
    wide = torch.promote_types(torch.float32, scale.dtype)
    kept = columns // m * n if m else columns
    w = dequantize(codes, scale, zero, bits=bits, group=group, columns=kept, dtype=wide)
    if m:
        assert meta is not None
        w = packing.expand_nm(w, meta, n, m, columns)
    if gain is not None:
        h = x.to(torch.promote_types(torch.float32, x.dtype))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        x = (h * gain.to(h.dtype)).to(x.dtype)
    y = torch.nn.functional.linear(x, w.to(x.dtype), bias)
    if left is not None and right is not None:
        few = torch.nn.functional.linear(x, right.to(x.dtype))
        y = y + torch.nn.functional.linear(few, left.to(x.dtype))
    return y if residual is None else y + residual


def _fused_flops(out: TensorType, x: TensorType, *rest: Any, columns: int, **attrs: Any) -> Dim:
    product = 2 * numel(out.shape) * columns
    if len(rest) < 9 or rest[7] is None:
        return product
    rank = rest[7].shape[1]
    return product + 2 * numel(out.shape) * rank + 2 * numel(x.shape) * rank


def _fused_ties(out: TensorType, x: TensorType, *rest: Any, **attrs: Any) -> list[Tie]:
    last = out.rank - 1
    codes, scale, zero, meta, bias, residual, gain, left, right = [*rest, *([None] * 9)][:9]
    rows = [(i, 0) for i, t in ((1, codes), (2, scale), (3, zero), (4, meta), (5, bias)) if t]
    inner = [(i, 1) for i, t in ((1, codes), (2, scale), (3, zero), (4, meta)) if t]
    ties = []
    for a in range(last):
        tokens = ((0, a), (6, a)) if residual is not None else ((0, a),)
        ties.append(Tie("same", tokens, (a,)))
    rows += [(6, last)] if residual is not None else []
    inner += [(0, last)] + ([(7, 0)] if gain is not None else [])
    if left is not None and right is not None:
        rows.append((8, 0))
        inner.append((9, 1))
        ties.append(Tie("contract", ((8, 1), (9, 0))))
    return [*ties, Tie("same", tuple(rows), (last,)), Tie("mix", tuple(inner))]


def _fused_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    (codes, scale), attrs = _codes_sample()[0]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, generator=g, dtype=torch.float64)
    gain = torch.randn(8, generator=g, dtype=torch.float64)
    residual = torch.randn(2, 3, generator=g, dtype=torch.float64)
    attrs = {k: attrs[k] for k in ("bits", "group", "columns")} | {"eps": 1e-6}
    left, right = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, 2), (2, 8)))
    given = (x, codes, scale, None, None, None, residual, gain)
    return [(given, attrs), ((*given, left, right), attrs)]


llmc_op(
    "fused_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero=None, Tensor? meta=None, "
    "Tensor? bias=None, Tensor? residual=None, Tensor? gain=None, Tensor? left=None, "
    "Tensor? right=None, *, int bits, int group, int columns, int n=0, int m=0, float eps=0.0) "
    "-> Tensor",
    _fused_type,
    fused_linear,
    ties=_fused_ties,
    flops=_fused_flops,
    samples=_fused_sample,
)
