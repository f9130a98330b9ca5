"""A weight as a product of two thinner ones, best for the inputs that it reads.

Among all A·B of rank k the error ‖(W - A·B) S‖_F, S Sᵀ = XᵀX, is least where W·S is cut to its k
leading singular directions, and then it is √Σ dropped σ² (Eckart and Young). With U_k the leading
left directions the factors are A = U_k and B = U_kᵀ W, which equals Σ_k V_kᵀ S⁻¹: S multiplies and
is never inverted, so a covariance of any rank will do. Methods differ in S alone: the identity is
plain SVD, a diagonal is FWSVD (Fisher) or ASVD (mean |x|), the Cholesky factor of XᵀX is SVD-LLM.

Sources: Eckart and Young, Psychometrika 1 (1936); FWSVD, arXiv 2207.00112; ASVD, arXiv 2312.05821;
SVD-LLM, arXiv 2403.07378; Halko, Martinsson and Tropp, arXiv 0909.4061.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ir.errors import ModelError, UsageError
from .low_rank import LowRankFactors, balanced

SOLVERS = ("auto", "svd", "gram", "randomised")
EXACT = 768
"""Up to this smaller side a full SVD is taken; beyond it the eigenvectors of the smaller Gram."""
OVERSAMPLE, POWERS = 16, 2
_EPS = torch.finfo(torch.float64).eps
_TRUSTED = 32.0  # a squared singular value counts above so many times the rounding of the largest


@dataclass(frozen=True)
class Root:
    """S with S Sᵀ = H, the metric in which a weight's error counts; all fp64.

    Attributes:
        kind: identity, diagonal, cholesky or eigen.
        value: None; [n]; lower [n, n]; or [n, rank] where H has less than full rank.
        notes: what was given up on the way, in words.
    """

    kind: str
    value: Tensor | None = None
    notes: tuple[str, ...] = ()

    def times(self, matrix: Tensor) -> Tensor:
        """matrix [m, n] · S: fp64 [m, n] or [m, rank]."""
        wide = matrix.double()
        if self.value is None:
            return wide
        return wide * self.value if self.kind == "diagonal" else wide @ self.value

    def width(self, columns: int) -> int:
        """Columns of W·S for a weight of that many."""
        return columns if self.value is None else int(self.value.shape[-1])

    def loss(self, delta: Tensor) -> float:
        """‖delta·S‖² for delta [m, n]."""
        return float(self.times(delta).square_().sum())


def identity() -> Root:
    """All errors of a weight alike."""
    return Root("identity")


def diagonal(scale: Tensor) -> Root:
    """Errors of column j count ``scale[j]``² times; a scale of zero says that none matters.

    Raises:
        ModelError: a scale [n] that is negative or not finite.
    """
    wide = scale.double()
    if not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise ModelError("expected finite scales of at least 0, found others")
    if not bool((wide > 0).any()):
        return Root("identity", None, ("scales are all zero, identity used",))
    return Root("diagonal", wide)


def whitening(gram: Tensor, jitter: float = 0.0) -> Root:
    """The root of H = XᵀX [n, n], or of any positive multiple of it.

    jitter: added to the diagonal, relative to its mean. Where H is not positive definite its
    eigenvectors above a relative cutoff are the root; where it holds NaN or Inf, or nothing, the
    identity is. Either is noted.
    Raises:
        UsageError: a bad shape or jitter.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise UsageError(f"whitening: expected XᵀX [n, n], found {list(gram.shape)}")
    if not 0 <= jitter <= 1:
        raise UsageError(f"whitening: expected a jitter of 0 to 1, found {jitter:g}")
    # LAPACK reads one triangle only; extremes pass NaN of either on.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(gram))).all()):
        return Root("identity", None, ("XᵀX holds NaN or Inf, identity used",))
    h = gram.double()
    mean, top = float(h.diagonal().mean()), float(h.diagonal().max())
    if top <= 0:
        return Root("identity", None, ("XᵀX is all zero, identity used",))
    if jitter:
        h = h.clone()
        h.diagonal().add_(jitter * mean)
    lower, info = torch.linalg.cholesky_ex(h)
    # A pivot that is rounding of its column says that the column depends on those before it.
    pivots = lower.diagonal().square()
    if int(info) == 0 and bool((pivots > len(h) * _EPS * h.diagonal()).all()):
        return Root("cholesky", lower)
    del lower
    values, vectors = torch.linalg.eigh(h)
    kept = values > len(h) * _EPS * values[-1]
    rank = int(kept.sum())
    note = f"XᵀX has rank {rank} of {len(h)}, its eigenvectors used"
    return Root("eigen", vectors[:, kept] * values[kept].sqrt(), (note,) if rank < len(h) else ())


@dataclass(frozen=True)
class Factored:
    """W ≈ left·right, leading directions first: the first k of them are the best of rank k.

    Attributes:
        factors: A [m, rank] and B [rank, n], fp64, balanced.
        spectrum: all singular values of W·S, falling, fp64; of a randomised solve only the first.
        dropped: Σ of the squared ones that were dropped, which is the squared error in the metric.
        whole: Σ of all squared ones; solver: the one that answered.
    """

    factors: LowRankFactors
    spectrum: Tensor
    dropped: float
    whole: float
    solver: str
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Directions that are kept."""
        return self.factors.left.shape[1]

    @property
    def error(self) -> float:
        """‖(W - A·B) S‖_F."""
        return math.sqrt(self.dropped)

    def to(self, rank: int) -> Factored:
        """The same solve cut to fewer directions."""
        a, b = self.factors
        more = float(self.spectrum[rank : self.rank].square().sum())
        fewer = LowRankFactors(a[:, :rank], b[:rank])
        return replace(self, factors=fewer, dropped=self.dropped + more)


def tail(spectrum: Tensor) -> Tensor:
    """Squared error at every rank from 0 to full: fp64 [len + 1], falling to exactly 0."""
    squares = spectrum.double().square().flip(0).cumsum(0).flip(0)
    return torch.cat([squares, squares.new_zeros(1)])


def spectrum(weight: Tensor, root: Root) -> Tensor:
    """Singular values of W·S, falling, fp64: [min(m, n)], or fewer where S has a smaller rank."""
    there = root.times(_finite(weight))
    if min(there.shape) <= EXACT:
        return torch.linalg.svdvals(there)
    return torch.linalg.eigvalsh(_smaller(there)).flip(0).clamp_(min=0).sqrt_()


def factor(
    weight: Tensor, root: Root, rank: int, *, solver: str = "auto", seed: int = 0
) -> Factored:
    """The best factors of that rank for ``weight`` [m, n] in the metric of ``root``.

    Directions beyond the rank of W·S lower no error that the metric sees; they are the plain SVD of
    what is left, so that factors of full rank are lossless for any metric.

    solver: ``svd``; ``gram``: eigenvectors of the smaller Gram of W·S, which squares the spread of
    the spectrum and gives way to svd where rounding hides direction ``rank``; ``auto``: svd up to
    :data:`EXACT`, then gram; ``randomised``: a range finder, near the best, its error computed.
    Raises:
        UsageError: a rank that is not in 1..min(m, n), an unknown solver. ModelError: a weight that
            is not finite.
    """
    full = min(weight.shape)
    if not 1 <= rank <= full:
        raise UsageError(f"rank: expected 1 to {full}, found {rank}")
    if solver not in SOLVERS:
        raise UsageError(f"solver: expected one of {', '.join(SOLVERS)}, found {solver!r}")
    small = min(weight.shape[0], root.width(weight.shape[1]))
    if solver == "auto" or (solver == "randomised" and rank + OVERSAMPLE >= small):
        solver = "svd" if small <= EXACT else "gram"
    notes = root.notes
    _finite(weight)
    found = _by_gram(weight, root, rank) if solver == "gram" else None
    if found is None and solver == "gram":
        notes, solver = (*notes, f"Gram matrix cannot tell direction {rank}, svd used"), "svd"
    if found is None:
        there = root.times(weight)
        whole = float(there.square().sum())
        if solver == "randomised":
            left, values = _range(there, rank, seed)
        else:
            left, values, _ = torch.linalg.svd(there, full_matrices=False)
        found = left, values, whole
        del there
    left, values, whole = found
    left = _filled(weight, left[:, :rank], values, rank)
    pair = balanced(left, left.t() @ weight.double())
    # The tail of a spectrum that was squared is only as good as its largest value's rounding.
    if solver == "svd":
        dropped = float(tail(values)[min(rank, len(values))])
    else:
        dropped = root.loss(pair.product.neg_().add_(weight))
    return Factored(pair, values, dropped, whole, solver, notes)


def refit(
    weight: Tensor, factors: LowRankFactors, reads: Tensor, crossed: Tensor | None = None
) -> LowRankFactors:
    """A moved to the least squares of ‖X Wᵀ - X' Bᵀ Aᵀ‖: the dense outputs from what B now reads.

    Args:
        reads: X'ᵀX' [n, n] of what the factored layer reads; crossed: XᵀX' [n, n], X what the dense
            one read; None where both read the same.
    Returns:
        The factors with B as it was; A stays where no input tells, by a pseudo-inverse.
    """
    a, b = (f.double() for f in factors)
    mixed = (reads if crossed is None else crossed).double() @ b.t()
    inner = b @ (reads.double() @ b.t())
    values, vectors = torch.linalg.eigh((inner + inner.t()) / 2)
    kept = values > len(values) * _EPS * values[-1].clamp(min=0)
    basis = vectors[:, kept]
    missing = weight.double() @ mixed - a @ inner
    return LowRankFactors(a + (missing @ basis / values[kept]) @ basis.t(), b)


def output_loss(
    weight: Tensor, made: Tensor, dense: Tensor, reads: Tensor | None = None,
    crossed: Tensor | None = None,
) -> float:  # fmt: skip
    """‖X Wᵀ - X' Ŵᵀ‖²; dense is XᵀX, reads X'ᵀX' and crossed XᵀX', all XᵀX unless given."""
    w, v, h = weight.double(), made.double(), dense.double()
    if reads is None or crossed is None:
        d = w - v
        return max(float((d @ h).mul_(d).sum()), 0.0)
    mixed = float((w @ crossed.double()).mul_(v).sum())
    total = float((w @ h).mul_(w).sum()) - 2 * mixed + float((v @ reads.double()).mul_(v).sum())
    return max(total, 0.0)


def _finite(weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise ModelError("expected a finite weight to factorise, found NaN or Inf")
    return weight


def _smaller(there: Tensor) -> Tensor:
    return there @ there.t() if there.shape[0] <= there.shape[1] else there.t() @ there


def _by_gram(weight: Tensor, root: Root, rank: int) -> tuple[Tensor, Tensor, float] | None:
    """Leading left directions, all values, Σ of their squares; None where rounding hides the last.

    W·S is let go before the eigenvectors are taken, and made again where they are the other side's.
    """
    gram = _smaller(root.times(weight))
    whole = float(gram.trace())
    values, vectors = torch.linalg.eigh(gram)
    del gram
    values = values.flip(0).clamp_(min=0)
    wanted = min(rank, len(values))
    if values[wanted - 1] <= _TRUSTED * len(values) * _EPS * values[0]:
        return None
    leading = vectors[:, -wanted:].flip(1)
    del vectors
    values = values.sqrt_()
    if weight.shape[0] > len(leading):
        # Orthogonal up to rounding, which grows as the values fall: made so.
        leading = torch.linalg.qr(root.times(weight) @ (leading / values[:wanted])).Q
    return leading, values, whole


def _range(there: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Near-leading left directions by power iterations on a random block, and their values."""
    g = torch.Generator(device=there.device).manual_seed(seed)
    start = torch.randn(
        there.shape[1], rank + OVERSAMPLE, generator=g, dtype=there.dtype, device=there.device
    )  # fmt: skip
    basis = torch.linalg.qr(there @ start).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(there @ torch.linalg.qr(there.t() @ basis).Q).Q
    inner, values, _ = torch.linalg.svd(basis.t() @ there, full_matrices=False)
    return basis @ inner[:, :rank], values[:rank]


def _filled(weight: Tensor, left: Tensor, values: Tensor, rank: int) -> Tensor:
    """``rank`` orthonormal directions: those of the metric, then plain ones of what is left."""
    floor = max(weight.shape) * _EPS * values[0]
    told = min(int((values > floor).sum()), rank)
    if told == rank:
        return left
    left = left[:, :told]
    rest = weight.double()
    rest = rest - left @ (left.t() @ rest)
    more = torch.linalg.svd(rest, full_matrices=False).U[:, : rank - told]
    # What rounding has left of the first directions is taken out once more.
    return torch.linalg.qr(torch.cat([left, more], 1)).Q
