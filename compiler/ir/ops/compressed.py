"""Rows of compressed weights: decode steps that compose.

Canonical storage (see spec/artefact.md): unsigned codes in dense bit streams, w = (q - zero)·scale.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import packing
from ..dims import same
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
