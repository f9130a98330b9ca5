"""Rows of sparse parts beside a weight: Ŵ = base + S, with S in compressed sparse rows (CSR).

``values`` [nnz] and ``index`` [nnz], the column of each, lie row after row; those of row r are at
``starts[r] : starts[r + 1]``, columns ascending.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dims import Dim, numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, llmc_op

NARROW = 1 << 15
"""Columns that a 16-bit index can name."""


def index_dtype(columns: int) -> torch.dtype:
    """The integers that hold the columns of a matrix of that width."""
    return torch.int16 if columns <= NARROW else torch.int32


def csr(support: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``index`` and ``starts`` of the True entries of support, bool [N, K]; values are W[support].

    Returns:
        (index int16 [nnz], int32 where K needs it; starts int32 [N + 1]).
    """
    index = support.nonzero()[:, 1].to(index_dtype(support.shape[1]))
    starts = torch.zeros(support.shape[0] + 1, dtype=torch.int32, device=support.device)
    starts[1:] = support.sum(1).cumsum(0)
    return index, starts


def coordinates(index: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each entry, int64 [nnz] each."""
    counts = starts.diff().to(torch.int64)
    rows = torch.arange(len(counts), device=starts.device).repeat_interleave(counts)
    return rows, index.to(torch.int64)


def _parts_fit(
    rows: Dim, columns: Dim, values: TensorType, index: TensorType, starts: TensorType
) -> None:
    wanted = index_dtype(columns) if isinstance(columns, int) else index.dtype
    if index.dtype != wanted or index.rank != 1 or index.shape != values.shape:
        raise ModelError(f"expected one {wanted} column per value, found {values}, {index}")
    if starts.dtype != torch.int32 or starts.rank != 1 or not same(starts.shape[0], rows + 1):
        raise ModelError(f"expected starts i32[{rows + 1}] for {rows} rows, found {starts}")


def _add_csr_type(
    base: TensorType, values: TensorType, index: TensorType, starts: TensorType
) -> TensorType:
    if base.rank != 2 or base.dtype != values.dtype:
        raise ModelError(f"expected a matrix and values of its dtype, found {base}, {values}")
    _parts_fit(base.shape[0], base.shape[1], values, index, starts)
    return base


def add_csr(
    base: torch.Tensor, values: torch.Tensor, index: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """base + S.

    Args:
        base: [N, K]; values: [nnz], of its dtype; index, starts: see the module.
    """
    return base.index_put(coordinates(index, starts), values, accumulate=True)


def _all_mixed(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    # Entries lie in row order, so that no row can go without counting those before it.
    axes = [(i, a) for i, t in enumerate(types) if isinstance(t, TensorType) for a in range(t.rank)]
    return [Tie("mix", tuple(axes), tuple(range(out.rank)))]


def _sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    support = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    return (torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), *csr(support))


def _add_csr_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    return [((torch.randn(3, 5, generator=g, dtype=torch.float64), *_sample()), {})]


llmc_op(
    "add_csr",
    "(Tensor base, Tensor values, Tensor index, Tensor starts) -> Tensor",
    _add_csr_type,
    add_csr,
    ties=_all_mixed,
    flops=lambda out, base, values, *rest: numel(values.shape),
    samples=_add_csr_sample,
)


def _csr_linear_type(
    y: TensorType, x: TensorType, values: TensorType, index: TensorType, starts: TensorType
) -> TensorType:
    if x.dtype != values.dtype or y.shape[:-1] != x.shape[:-1]:
        raise ModelError(f"expected x […, K] beside y […, N] and values, found {x}, {y}, {values}")
    _parts_fit(y.shape[-1], x.shape[-1], values, index, starts)
    return y


def csr_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """y + x · Sᵀ, the sparse part of a linear by itself.

    Args:
        y: [..., N], what the rest of the weight gives; x: [..., K]; S: [N, K], see the module.
    """
    zeros = values.new_zeros(y.shape[-1], x.shape[-1])
    return y + torch.nn.functional.linear(x, add_csr(zeros, values, index, starts))


def _csr_linear_ties(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    tokens = [Tie("same", ((0, a), (1, a)), (a,)) for a in range(out.rank - 1)]
    last = out.rank - 1
    inner = Tie("mix", ((0, last), (1, last), (2, 0), (3, 0), (4, 0)), (last,))
    return [*tokens, inner]


def _csr_linear_flops(out: TensorType, y: TensorType, x: TensorType, *rest: TensorType) -> Dim:
    return 2 * numel(out.shape[:-1]) * numel(rest[0].shape)


def _csr_linear_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(1)
    y = torch.randn(2, 3, generator=g, dtype=torch.float64)
    x = torch.randn(2, 5, generator=g, dtype=torch.float64)
    return [((y, x, *_sample()), {})]


llmc_op(
    "csr_linear",
    "(Tensor y, Tensor x, Tensor values, Tensor index, Tensor starts) -> Tensor",
    _csr_linear_type,
    csr_linear,
    ties=_csr_linear_ties,
    flops=_csr_linear_flops,
    samples=_csr_linear_sample,
)
