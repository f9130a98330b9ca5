"""The best matrix of low rank for what a grid or a mask left behind.

The best A·B of rank k for E in ‖(E - A·B) X‖_F, X Xᵀ = H, is U Uᵀ E, U the k leading left singular
vectors of E H^½ (Eckart and Young). They are eigenvectors of E H Eᵀ, so H is neither factorised
nor inverted, and a Hessian of any rank will do. Without H it is the plain truncated SVD.

Source: LoRC of ZeroQuant-V2 (arXiv 2303.08302).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def balanced(left: Tensor, right: Tensor) -> LowRankFactors:
    """The same product, each direction's length halved; ``left`` comes with columns of length 1."""
    length = right.norm(dim=1)
    half = torch.where(length > 0, length, 1.0).sqrt()
    return LowRankFactors(left * half, right / half[:, None])
