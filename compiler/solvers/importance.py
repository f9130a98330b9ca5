"""How much each unit of a group matters, and how what stays makes up for what goes.

A unit is a set of indices of one axis of a matrix: ``unit_of`` int64 [n] names the unit of each
index, -1 for none. Scores are fp64 [units] and never negative; a low score may go. Matrices are
[m, n], out × in, statistics are of the inputs x [T, n].

Sources: LLM-Pruner (arXiv 2305.11627) for the Taylor scores and group reduction, FLAP
(arXiv 2312.11983), Wanda (arXiv 2306.11695), Michel et al. (arXiv 1905.10650), OBS for a set of
weights (Hassibi & Stork 1993; Frantar & Alistarh, arXiv 2208.11580).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.errors import UsageError
from .hessian import prepare

REDUCTIONS = ("sum", "max", "mean")
ORDERS = ("first", "second", "mixed", "vector")


def along(element: Tensor, axis: int) -> Tensor:
    """Sum over every other axis: [size of the axis], fp64."""
    wide = element.double()
    return wide.movedim(axis, 0).flatten(1).sum(1) if wide.dim() > 1 else wide


def per_unit(values: Tensor, unit_of: Tensor, units: int, *, mean: bool = False) -> Tensor:
    """Sum (or mean) of values [n] over the indices of each unit: [units], fp64."""
    mine = unit_of >= 0
    index = unit_of[mine].to(values.device)
    out = torch.zeros(units, dtype=torch.float64, device=values.device)
    out.index_add_(0, index, values.double()[mine.to(values.device)])
    if not mean:
        return out
    counts = torch.bincount(index, minlength=units).clamp(min=1)
    return out / counts


def combine(parts: Sequence[Tensor], reduction: str) -> Tensor:
    """One score of a unit from those of its members: parts each [units].

    Raises:
        UsageError: an unknown reduction or no part.
    """
    if not parts or reduction not in REDUCTIONS:
        raise UsageError(f"expected parts and one of {REDUCTIONS}, found {len(parts)}, {reduction}")
    stacked = torch.stack([p.double() for p in parts])
    if reduction == "max":
        return stacked.amax(0)
    return stacked.sum(0) if reduction == "sum" else stacked.mean(0)


def magnitude(weight: Tensor) -> Tensor:
    """w², so that a unit's score is its squared L2 norm; of the weight's shape."""
    return weight.double().square()


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    """|W_ij| · ||x_j||₂ with norm [n], x along the last axis; of the weight's shape."""
    return weight.double().abs() * norm.double()


def taylor(weight: Tensor, mean: Tensor, square: Tensor, order: str, axis: int) -> Tensor:
    """Estimated change of the loss when an index of ``axis`` is set to zero: [size of the axis].

    Args:
        mean: mean gradient over samples; square: mean squared gradient (diagonal Fisher).
        order: ``first`` Σ|g w|, ``second`` Σ w² E g², ``mixed`` Σ|g w - ½ w² E g²|, ``vector``
            |Σ g w|.
    Raises:
        UsageError: an unknown order.
    """
    if order not in ORDERS:
        raise UsageError(f"taylor: expected one of {', '.join(ORDERS)}, found {order!r}")
    w = weight.double()
    if order == "second":
        return along(w.square() * square.double(), axis)
    slope = mean.double() * w
    if order == "vector":
        return along(slope, axis).abs()
    if order == "mixed":
        slope = slope - 0.5 * w.square() * square.double()
    return along(slope.abs(), axis)


def masked_slope(weight: Tensor, gradient: Tensor, axis: int) -> Tensor:
    """∂loss/∂m_j at m = 1 of a mask m on the inputs: Σ_i W_ij ∂loss/∂W_ij, signed [n]."""
    return along(weight.double() * gradient.double(), axis)


def fluctuation(weight: Tensor, variance: Tensor) -> Tensor:
    """Var(x_j) · ||W_:j||²: the diagonal of the error that a bias cannot repair, [n] fp64."""
    return variance.double() * along(weight.double().square(), weight.dim() - 1)


def obs(
    weight: Tensor, gram: Tensor, unit_of: Tensor, units: int, damp: float = 0.01
) -> Tensor:  # fmt: skip
    """Least loss tr(D H Dᵀ) of setting a unit P to zero when all other inputs may compensate.

    tr(W_P ([H⁻¹]_PP)⁻¹ W_Pᵀ), H = XᵀX damped relative to its mean diagonal, fp64 throughout.
    """
    w = weight.double()
    inverse = _inverse(gram, damp)
    out = torch.zeros(units, dtype=torch.float64, device=w.device)
    places = [(unit_of == u).nonzero().view(-1) for u in range(units)]
    for size in {len(p) for p in places} - {0}:
        mine = [u for u, p in enumerate(places) if len(p) == size]
        at = torch.stack([places[u] for u in mine]).to(w.device)
        block = inverse[at[:, :, None], at[:, None, :]]
        part = w[:, at].movedim(0, -1)  # [units, P, m]
        out[mine] = (part * torch.linalg.solve(block, part)).sum((1, 2))
    return out.clamp_(min=0)


def _inverse(gram: Tensor, damp: float) -> Tensor:
    """(H + ridge)⁻¹ in fp64, in units of the given H, with the ladder of :mod:`.hessian`."""
    h = gram.double()
    factor = prepare(h, damp)
    root = factor.root()
    flat = torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=True)
    total = float(factor.diagonal.sum())
    unit = float(h.diagonal().sum()) / total if factor.kind != "identity" and total > 0 else 1.0
    return flat.T @ flat / unit


def refit(weight: Tensor, second: Tensor, kept: Tensor, damp: float = 0.01) -> Tensor:
    """The kept columns, moved to the least-squares best given that all others are zero.

    Minimises tr(D (H + ridge) Dᵀ), D the change of the weight.

    Args:
        second: H = XᵀX, or the covariance where a bias repairs the mean; [n, n].
        kept: int64 indices.
    Returns:
        [m, kept], fp64.
    """
    w, h = weight.double(), second.double()
    gone = torch.ones(len(h), dtype=torch.bool, device=h.device)
    gone[kept] = False
    factor = prepare(h, damp)
    factor.root()  # walks the ladder, so that the damping that holds is known
    ridge = factor.ridge if factor.ridge > 0 else 0.0
    mine = factor.hessian[kept][:, kept].clone()
    mine.diagonal().add_(ridge)
    right = factor.hessian[kept][:, gone] @ w[:, gone].T
    return w[:, kept] + torch.linalg.solve(mine, right).T


def shift(weight: Tensor, now: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """What the bias gains so that the mean output stays: W x̄ - W' x̄_kept, [m] fp64.

    With unmoved columns this is FLAP's W_:P x̄_P.

    Args:
        weight: [m, n] before; now: [m, kept] after; mean: x̄ [n]; kept: int64 indices.
    """
    x = mean.double()
    return weight.double() @ x - now.double() @ x[kept]


def standardise(scores: Tensor, spread: float) -> Tensor:
    """(s - mean) / spread over one group, zeros where nothing spreads: fp64 [units]."""
    s = scores.double()
    return (s - s.mean()) / spread if spread > 0 else torch.zeros_like(s)


def random(units: int, seed: int) -> Tensor:
    """Uniform scores, fp64 [units]."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(units, generator=g, dtype=torch.float64)
