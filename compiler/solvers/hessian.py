"""The second-order statistic made safe to use: checks, damping, and the one Cholesky factor that
the sweeps need.

A sweep over inputs needs U, the upper factor of the *inverse* Hessian. ``H + ridge*I = R R^T``
with R upper triangular
(the Cholesky factor of H with both axes flipped) gives ``U = R^-1``, and the sweep can be written
with R itself, so neither the inverse nor a
second factor is formed: one Cholesky instead of three. U is only needed on diagonal blocks.

Fallback ladder, each rung recorded in words: fp32 -> fp64 -> damping times 10 up to 1 -> diagonal
of H -> identity (then OBS is
round-to-nearest). A dead input (diagonal 0) is decoupled by clearing its row and column: it is
rounded to nearest, never zeroed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ir.errors import UsageError

NO_HESSIAN = "hessian: none given, identity used"
MAX_DAMP = 1.0
MIN_DAMP = 1e-3  # first rung when no damping was asked for
_SAFE = (2.0**-40, 2.0**40)  # a mean diagonal outside is rescaled by a power of two


class Factor:
    """A checked, normalised Hessian and its Cholesky factors, shared by every weight that
    reads the same input.

    Attributes (after `prepare`):
        hessian: ``[n, n]`` fp32 or fp64, what losses are measured with; divided by a power of
        two where extreme (losses are relative, so that is free); 0 on dead inputs.
        kind: "full", "diagonal" or "identity".
        damp: relative damping in use; ridge: the same, absolute, in units of ``hessian``.
        fallbacks: what was given up, in order.
    """

    def __init__(
        self, hessian: Tensor, kind: str, damp: float, mean: float, fallbacks: tuple[str, ...]
    ) -> None:
        self.hessian, self.kind, self.damp, self.mean = hessian, kind, damp, mean
        self.ridge = damp * mean
        self.fallbacks = fallbacks
        self._roots: dict[tuple[int, ...] | None, Tensor] = {}

    @property
    def diagonal(self) -> Tensor:
        """diag(H) ``[n]``, undamped."""
        return self.hessian.diagonal()

    @property
    def ready(self) -> Tensor | None:
        """R in the natural order, when it has been computed already."""
        return self._roots.get(None)

    def root(self, order: Tensor | None = None) -> Tensor:
        """Upper R ``[n, n]`` with ``H + ridge*I = R R^T`` for the inputs taken in ``order``.

        Cached for the natural order and the last other one. Walks the fallback ladder on the first
        call; later orders reuse the damping that held.
        """
        key = None if order is None else tuple(order.tolist())
        if key not in self._roots:
            root = self._factorise(order)
            for stale in [k for k in self._roots if k is not None]:
                del self._roots[stale]
            self._roots[key] = root
        return self._roots[key]

    def _factorise(self, order: Tensor | None) -> Tensor:
        needed = self.damp
        while True:
            h = self.hessian if order is None else self.hessian[order][:, order]
            if self.kind != "full":
                return torch.diag((h.diagonal() + self.ridge).sqrt())
            root = _upper_root(h, self.ridge)
            if root is None and h.dtype == torch.float32:
                root = _upper_root(h.double(), self.ridge)
                if root is not None:
                    root = root.float()
                    self._note("hessian: fp32 Cholesky failed, factorised in fp64")
            if root is not None:
                if needed and self.damp > needed:
                    self._settle_indefinite()
                return root
            self._roots.clear()
            step = max(self.damp * 10, MIN_DAMP)
            if step <= MAX_DAMP:
                self._note(f"hessian: not positive definite, damp raised to {step:g}")
                self.damp, self.ridge = step, step * self.mean
            else:
                self._note("hessian: not positive definite at any damping, diagonal used")
                self._diagonalise()

    def _settle_indefinite(self) -> None:
        """No Gram matrix fails with a ridge; judge answers by the damped one, which is positive."""
        self.hessian = self.hessian.clone()
        self.hessian.diagonal().add_(self.ridge)
        self.ridge = 0.0

    def _diagonalise(self) -> None:
        diagonal = self.diagonal.clamp(min=0)
        if bool((diagonal > 0).any()):
            self.kind, self.hessian = "diagonal", torch.diag(diagonal)
            self.ridge = self.damp * self.mean
        else:
            self.kind, self.hessian = "identity", torch.eye(len(diagonal)).to(self.hessian)
            self.damp, self.ridge, self.mean = 0.0, 0.0, 1.0

    def _note(self, text: str) -> None:
        if text not in self.fallbacks:
            self.fallbacks = (*self.fallbacks, text)


def _upper_root(h: Tensor, ridge: float) -> Tensor | None:
    """R upper with ``h + ridge*I = R R^T``, or None where that is not positive definite."""
    flipped = h.flip(0, 1)
    flipped.diagonal().add_(ridge)
    lower, info = torch.linalg.cholesky_ex(flipped)
    if int(info) != 0:
        return None
    root = lower.flip(0, 1)
    diagonal = root.diagonal()
    good = bool(torch.isfinite(diagonal).all()) and bool((diagonal > 0).all())
    return root if good else None


def prepare(
    hessian: Tensor | None,
    damp: float = 0.01,
    *,
    inputs: int | None = None,
    device: torch.device | None = None,
) -> Factor:
    """Check ``hessian`` [n, n] (X^T X times any positive constant) and make it ready for `solve`.

    damp: ridge relative to the mean of the diagonal, >= 0. hessian None needs ``inputs`` (n)
    and means "no calibration". fp64 stays fp64, all else becomes fp32.
    Raises UsageError for a bad shape or damping. A Hessian that cannot be used is never an
    error: the factor says what it fell back to.
    """
    if not damp >= 0 or damp > MAX_DAMP:
        raise UsageError(f"damp: expected 0 to {MAX_DAMP:g}, found {damp:g}")
    if hessian is None:
        if inputs is None:
            raise UsageError("prepare: expected a Hessian or the number of inputs, found neither")
        return Factor(
            torch.eye(inputs, device=device),
            "identity",
            0.0,
            1.0,
            (NO_HESSIAN,),
        )
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise UsageError(f"hessian: expected [n, n], found {list(hessian.shape)}")
    n = hessian.shape[0]
    h = hessian if hessian.dtype == torch.float64 else hessian.float()

    def identity(why: str) -> Factor:
        return Factor(torch.eye(n).to(h), "identity", 0.0, 1.0, (f"hessian: {why}, identity used",))

    # LAPACK reads one triangle only, so a NaN in the other would pass unseen; extremes pass NaN on
    extremes = torch.stack(torch.aminmax(h))
    if not bool(torch.isfinite(extremes).all()):
        return identity("NaN or Inf found")
    diagonal = h.diagonal().double()
    if bool((diagonal < 0).any()):
        return identity("negative diagonal found")
    mean = float(diagonal.mean())
    if mean <= 0:
        return identity("all zero")
    if not _SAFE[0] <= mean <= _SAFE[1]:
        unit = 2.0 ** math.frexp(mean)[1]
        h, mean = (h.double() / unit).to(h.dtype), mean / unit
    notes: list[str] = []
    if _skewed(h):
        notes.append("hessian: not symmetric, symmetrised")
        h = (h + h.t()) / 2
    dead = h.diagonal() == 0
    if bool(dead.any()):
        alive = (~dead).to(h.dtype)
        h = h * alive[:, None] * alive[None, :]
        notes.append(f"hessian: {int(dead.sum())} dead inputs, rounded to nearest")
    return Factor(h, "full", float(damp), mean, tuple(notes))


def _skewed(h: Tensor) -> bool:
    """Whether H and H^T act differently on a fixed vector (cheaper than a transposed pass).

    Measured in correlations, so that one loud input does not drown the others.
    """
    quiet = h.diagonal().clamp(min=0).rsqrt().nan_to_num(posinf=0.0)
    probe = torch.cos(torch.arange(len(h), device=h.device, dtype=torch.float64)).to(h) * quiet
    apart = (h @ probe - h.t() @ probe) * quiet
    return float(apart.abs().amax()) > 1e-3 * math.sqrt(len(h))
