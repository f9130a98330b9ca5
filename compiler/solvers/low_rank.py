"""The best matrix of low rank for what a grid or a mask left behind.

Factors may be stored in codes: then A is rounded first, and B is fitted to A as it is stored.

The best A·B of rank k for E in ‖(E - A·B) X‖_F, X Xᵀ = H, is U Uᵀ E, U the k leading left singular
vectors of E H^½ (Eckart and Young). They are eigenvectors of E H Eᵀ, so H is neither factorised
nor inverted, and a Hessian of any rank will do. Without H it is the plain truncated SVD.

Source: LoRC of ZeroQuant-V2 (arXiv 2303.08302).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .grid import Grid, Rounded, rtn


class LowRankFactors(NamedTuple):
    """A ``[m, k]`` and B ``[k, n]``, fp64, leading directions first, equally long in each."""

    left: Tensor
    right: Tensor

    @property
    def product(self) -> Tensor:
        """A·B ``[m, n]``."""
        return self.left @ self.right

    def stored(self, dtype: torch.dtype) -> LowRankFactors:
        """As that dtype holds them."""
        return LowRankFactors(*(t.to(dtype).contiguous() for t in self))


def low_rank(residual: Tensor, rank: int, hessian: Tensor | None = None) -> LowRankFactors:
    """The factors of the best matrix of that rank, at most min(m, n), for ``residual`` [m, n].

    hessian: ``[n, n]``, positive semidefinite; with it the error counts at the output.
    """
    e = residual.double()
    basis: Tensor | None = None
    if e.shape[0] > e.shape[1]:
        basis, e = torch.linalg.qr(e)
    there = e if hessian is None else e @ hessian.double()
    square = there @ e.t()
    vectors = torch.linalg.eigh((square + square.t()) / 2).eigenvectors
    leading = vectors.flip(1)[:, :rank]
    left = leading if basis is None else basis @ leading
    return balanced(left, leading.t() @ e)


class CodedFactors(NamedTuple):
    """A and B on grids of their own, one scale per row."""

    left: Rounded
    right: Rounded

    @property
    def product(self) -> Tensor:
        """A·B ``[m, n]`` of what the codes stand for, fp32."""
        return self.left.weight @ self.right.weight


def coded(factors: LowRankFactors, residual: Tensor, bits: int) -> CodedFactors:
    """Factors of ``residual`` [m, n] in codes of ``bits``.

    B gives every direction its length and has a scale for each, so that A's rows, whose scales are
    shared by all directions, hold them alike. A⁺·E is the best B for an A whatever errors are
    weighed by.
    """
    grid = Grid(bits, None)
    left = rtn(torch.nn.functional.normalize(factors.left, dim=0).float(), grid)
    right = torch.linalg.pinv(left.weight.double()) @ residual.double()
    return CodedFactors(left, rtn(right.float(), grid))


def balanced(left: Tensor, right: Tensor) -> LowRankFactors:
    """The same product, each direction's length halved; ``left`` comes with columns of length 1."""
    length = right.norm(dim=1)
    half = torch.where(length > 0, length, 1.0).sqrt()
    return LowRankFactors(left * half, right / half[:, None])
