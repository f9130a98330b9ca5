"""Rows of weights whose codes stand for levels: tables, sums of signs, scales that are codes.

Codes are packed as in :mod:`..packing`; see spec/artefact.md.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import packing
from ..dims import same
from ..errors import ModelError
from ..levels import WIDTHS
from ..levels import levels as named_levels
from ..types import TensorType
from .base import Tie, llmc_op
from .compressed import groups_of


def _lookup_type(
    codes: TensorType, scale: TensorType | None = None, table: TensorType | None = None, *,
    bits: int, group: int, columns: int, levels: str = "", dtype: torch.dtype = torch.float32,
) -> TensorType:  # fmt: skip
    if not 1 <= bits <= 8 or (levels and bits not in WIDTHS.get(levels, ())):
        named = f" of {levels!r} levels" if levels else ""
        raise ModelError(f"expected 1 to 8 bits that a grid can have, found {bits}{named}")
    words, groups = packing.packed_words(columns, bits), groups_of(columns, group)
    if codes.rank != 2 or codes.dtype != torch.int32 or not same(codes.shape[-1], words):
        raise ModelError(f"expected codes i32[N, {words}] for {columns} columns, found {codes}")
    if scale is not None and scale.shape != (codes.shape[0], groups):
        raise ModelError(f"expected scale [N, {groups}] beside {codes}, found {scale}")
    if (table is None) != bool(levels):
        raise ModelError(f"expected a table or levels by name, found {table} and {levels!r}")
    if table is not None and (
        table.rank != 2 or table.shape not in ((1, 1 << bits), (codes.shape[0], 1 << bits))
    ):
        raise ModelError(f"expected a table [1 or N, {1 << bits}] beside {codes}, found {table}")
    return TensorType((codes.shape[0], columns), dtype)


def lookup(
    codes: torch.Tensor, scale: torch.Tensor | None = None, table: torch.Tensor | None = None, *,
    bits: int, group: int, columns: int, levels: str = "", dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """table[q], times the scale of its group of ``group`` columns where there are scales.

    Args:
        codes: int32 [N, words], packed rows. scale: [N, G].
        table: [N, 2**bits], one per row, or [1, 2**bits]; None for the fixed ``levels`` of that
            name (see :mod:`..levels`).
    Returns:
        [N, columns] in ``dtype``; computed in fp32, so codes and tables give one weight exactly.
    """
    q = packing.unpack(codes, bits, columns).to(torch.int64)
    wide = torch.float32
    for part in (scale, table):
        wide = wide if part is None else torch.promote_types(wide, part.dtype)
    if table is None:
        values = named_levels(levels, bits).to(codes.device, wide)[q]
    else:
        values = torch.take_along_dim(table.to(wide), q, -1)
    if scale is not None:
        which = torch.arange(columns, device=codes.device) // group
        values = values * scale.to(wide)[:, which]
    return values.to(dtype)


def _lookup_ties(out: TensorType, codes: Any, *rest: Any, **attrs: Any) -> list[Tie]:
    parts = [(0, codes), *((i, t) for i, t in enumerate(rest, 1) if isinstance(t, TensorType))]
    own = [i for i, t in parts if same(t.shape[0], out.shape[0])]
    shared = [(i, 0) for i, _ in parts if i not in own]
    inner = tuple((i, 1) for i, _ in parts)
    ties = [Tie("same", tuple((i, 0) for i in own), (0,)), Tie("mix", inner, (1,))]
    return ties + ([Tie("mix", tuple(shared))] if shared else [])


def _lookup_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    codes = packing.pack(torch.randint(0, 16, (3, 8), generator=g), 4)
    scale = torch.rand(3, 2, generator=g, dtype=torch.float64)
    table = torch.randn(3, 16, generator=g, dtype=torch.float64)
    attrs = {"bits": 4, "group": 4, "columns": 8, "dtype": torch.float64}
    return [
        ((codes, scale), attrs | {"levels": "nf"}),
        ((codes, None, table), attrs | {"group": 8}),
        ((codes, scale, table[:1]), attrs),
    ]


llmc_op(
    "lookup",
    "(Tensor codes, Tensor? scale=None, Tensor? table=None, *, int bits, int group, int columns, "
    "str levels='', ScalarType dtype=float) -> Tensor",
    _lookup_type,
    lookup,
    ties=_lookup_ties,
    samples=_lookup_sample,
)


def _signs_type(
    signs: TensorType, factors: TensorType, *, group: int, columns: int,
    dtype: torch.dtype = torch.float32,
) -> TensorType:  # fmt: skip
    words, groups = packing.packed_words(columns, 1), groups_of(columns, group)
    if signs.rank != 3 or signs.dtype != torch.int32 or not same(signs.shape[-1], words):
        raise ModelError(f"expected signs i32[b, N, {words}] for {columns} columns, found {signs}")
    if factors.shape != (*signs.shape[:2], groups):
        raise ModelError(f"expected factors [b, N, {groups}] beside {signs}, found {factors}")
    return TensorType((signs.shape[1], columns), dtype)


def sum_signs(
    signs: torch.Tensor, factors: torch.Tensor, *, group: int, columns: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """Sum over i of factors[i] · (±1), plane after plane.

    Args:
        signs: int32 [b, N, words], one bit per weight: 1 is +1, 0 is -1. factors: [b, N, G], per
            group of ``group`` columns.
    Returns:
        [N, columns] in ``dtype``; summed in fp32 in the order of the planes.
    """
    wide = torch.promote_types(torch.float32, factors.dtype)
    which = torch.arange(columns, device=signs.device) // group
    bits = packing.unpack(signs, 1, columns).to(wide) * 2 - 1
    planes = bits * factors.to(wide)[..., which]
    total = planes[0]
    for plane in planes[1:]:
        total = total + plane
    return total.to(dtype)


def _signs_ties(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    planes = Tie("mix", ((0, 0), (1, 0)))
    return [Tie("same", ((0, 1), (1, 1)), (0,)), Tie("mix", ((0, 2), (1, 2)), (1,)), planes]


def _signs_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    signs = packing.pack(torch.randint(0, 2, (2, 3, 8), generator=g), 1)
    factors = torch.rand(2, 3, 2, generator=g, dtype=torch.float64)
    return [((signs, factors), {"group": 4, "columns": 8, "dtype": torch.float64})]


llmc_op(
    "sum_signs",
    "(Tensor signs, Tensor factors, *, int group, int columns, ScalarType dtype=float) -> Tensor",
    _signs_type,
    sum_signs,
    ties=_signs_ties,
    samples=_signs_sample,
)


def _scales_type(
    codes: TensorType, step: TensorType, mean: TensorType, *, block: int, rows: int, columns: int
) -> TensorType:
    count = rows * columns
    if codes.dtype != torch.uint8 or codes.rank != 1 or not same(codes.shape[0], count):
        raise ModelError(f"expected scale codes u8[{count}] for {rows}x{columns}, found {codes}")
    if step.shape != (groups_of(count, block),) or mean.shape != (1,):
        raise ModelError(
            f"expected {groups_of(count, block)} steps and one mean, found {step}, {mean}"
        )
    return TensorType((rows, columns), torch.promote_types(torch.float32, step.dtype))


def decode_scales(
    codes: torch.Tensor, step: torch.Tensor, mean: torch.Tensor, *, block: int, rows: int,
    columns: int,
) -> torch.Tensor:  # fmt: skip
    """mean + (q - 128)·step, one step per block of ``block`` scales counted row after row.

    Args:
        codes: uint8 [rows * columns]; step: [blocks]; mean: [1].
    Returns:
        [rows, columns], at least fp32.
    """
    wide = torch.promote_types(torch.float32, step.dtype)
    which = torch.arange(len(codes), device=codes.device) // block
    flat = (codes.to(wide) - 128) * step.to(wide)[which] + mean.to(wide)
    return flat.view(rows, columns)


def _scales_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (6,), generator=g).to(torch.uint8)
    step = torch.rand(2, generator=g, dtype=torch.float64)
    mean = torch.rand(1, generator=g, dtype=torch.float64)
    return [((codes, step, mean), {"block": 4, "rows": 3, "columns": 2})]


def _scales_ties(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    # Blocks run over rows, so that no row can go without moving those behind it.
    return [Tie("mix", ((0, 0), (1, 0)), (0, 1)), Tie("mix", ((2, 0),))]


llmc_op(
    "decode_scales",
    "(Tensor codes, Tensor step, Tensor mean, *, int block, int rows, int columns) -> Tensor",
    _scales_type,
    decode_scales,
    ties=_scales_ties,
    samples=_scales_sample,
)
