"""The layer loss ``tr(D H D^T)``, row by row, from the factor or from H itself.

With R at hand (``H + ridge*I = R R^T``) half of the work is skipped, because R is triangular.
Subtracting the ridge again cancels where the ridge dominates (few tokens, dead inputs), and
so does H itself where inputs are nearly dependent; those rows are computed anew in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANCELLED = 0.01  # rows whose loss is below this share of its parts are computed anew in fp64
_PANEL = 512


def damped_rows(delta_t: Tensor, root: Tensor) -> Tensor:
    """Row losses ``||D R||^2`` [m] in fp64; delta_t ``[n, m]`` in the order of root."""
    n, m = delta_t.shape
    total = torch.zeros(m, dtype=torch.float64, device=delta_t.device)
    for a in range(0, n, _PANEL):
        b = min(a + _PANEL, n)
        total += (root[:b, a:b].t() @ delta_t[:b]).square_().sum(0).double()
    return total


def undamp(damped: Tensor, delta_t: Tensor, hessian: Tensor, ridge: float) -> Tensor:
    """Row losses ``tr(D H D^T)`` [m] in fp64 from the damped ones; one order throughout."""
    if ridge == 0:
        return damped
    plain = damped - ridge * delta_t.square().sum(0).double()
    weak = (plain < CANCELLED * damped).nonzero().view(-1)
    if len(weak):
        plain[weak] = exact_rows(delta_t[:, weak].double(), hessian.double())
    return plain


def exact_rows(delta_t: Tensor, hessian: Tensor) -> Tensor:
    """Row losses ``d H d^T`` [m] in fp64, straight from H ``[n, n]``."""
    rows = (hessian @ delta_t).mul_(delta_t).sum(0).double()
    if hessian.dtype != torch.float64:
        alone = hessian.diagonal() @ delta_t.square()  # the loss if inputs were uncorrelated
        weak = (rows < CANCELLED * alone).nonzero().view(-1)
        if len(weak):
            rows[weak] = exact_rows(delta_t[:, weak].double(), hessian.double())
    return rows.clamp_(min=0)
