"""Tucker form: a tensor as a small core with an orthonormal factor along each of its axes.

T [n₁, …, n_N] ≈ core ×₁ U₁ … ×_N U_N, U_i [n_i, k_i] with orthonormal columns; an axis that keeps
its whole size has no factor. HOSVD takes the leading left directions of each unfolding, and its
error is at most √N times the least there is, N the axes that are cut. HOOI takes them in turn of
what the other factors leave, or steps towards them, which never raises the error. As the factors
are orthonormal the core is what they keep: error² = ‖T‖² - ‖core‖², exactly.

Stacked weights [E, R, C] become W_e ≈ left · core_e · right, left and right shared by all: the
axes of rows and of columns are cut, and with ``mix`` that of the matrices too.

Sources: De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21 (2000), 1253 (HOSVD)
and 1324 (HOOI); whitening as in :mod:`.factor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..ir.errors import ModelError, UsageError
from .factor import EXACT, Root, factor

SWEEPS, SETTLED = 10, 1e-5
"""At most so many sweeps; fewer once one lowers the error by less than this share of ‖T‖²."""
POWERS = 2
"""Steps of orthogonal iteration in a sweep where an unfolding is large."""


@dataclass(frozen=True)
class Tucker:
    """A tensor in Tucker form, fp64.

    Attributes:
        core: [k₁, …, k_N]; factors: [n_i, k_i] with orthonormal columns, None for a whole axis.
        whole: ‖T‖²; history: squared error of HOSVD, then after each sweep, never rising.
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]
    whole: float
    history: tuple[float, ...]

    @property
    def dropped(self) -> float:
        """Squared error."""
        return self.history[-1]

    def dense(self) -> Tensor:
        """The tensor that it stands for."""
        out = self.core
        for axis, u in enumerate(self.factors):
            out = out if u is None else _times(out, axis, u)
        return out


def tucker(tensor: Tensor, ranks: Sequence[int], sweeps: int = SWEEPS) -> Tucker:
    """HOSVD with these ranks, improved by HOOI; a rank of the full size leaves its axis as it is.

    sweeps: at most so many of HOOI; 0: HOSVD alone.
    Raises:
        UsageError: a rank above its size, or less and above the product of the others, or below 1.
        ModelError: a number that is not finite.
    """
    check_ranks(tensor.shape, ranks)
    wide = _finite(tensor).double()
    cut = [i for i, (n, k) in enumerate(zip(wide.shape, ranks, strict=True)) if k < n]
    found: dict[int, Tensor] = {i: leading(wide, i)[:, : ranks[i]] for i in cut}
    whole = float(torch.linalg.vector_norm(wide)) ** 2
    history = [_lost(wide, _core(wide, found), found)]
    for _ in range(sweeps if len(cut) > 1 else 0):
        before = dict(found)
        for i in cut:
            rest = _core(wide, {j: u for j, u in found.items() if j != i})
            found[i] = _turned(rest, i, found[i])
        lost = _lost(wide, _core(wide, found), found)
        if lost >= history[-1]:
            found = before  # what is left to gain is rounding
            break
        history.append(lost)
        if history[-2] - lost <= SETTLED * whole:
            break
    factors = tuple(found.get(i) for i in range(wide.ndim))
    return Tucker(_core(wide, found), factors, whole, tuple(history))


def _finite(tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError("expected finite numbers to decompose, found NaN or Inf")
    return tensor


def check_ranks(sizes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raises UsageError for ranks above a size, or that leave a factor directions without a use."""
    whole = prod(ranks)
    fits = len(ranks) == len(sizes) and all(
        1 <= k <= n and (k == n or k * k <= whole) for n, k in zip(sizes, ranks, strict=True)
    )
    if not fits:
        raise UsageError(
            f"ranks: expected up to {list(sizes)}, and less than that up to the product of the "
            f"others, found {list(ranks)}"
        )


def leading(tensor: Tensor, axis: int) -> Tensor:
    """Orthonormal directions along an axis, those that hold most first: fp64 [n, min(n, others)].

    A full SVD of the unfolding up to :data:`.factor.EXACT`, beyond it the smaller Gram's vectors.
    """
    unfolded = tensor.movedim(axis, 0).flatten(1)
    if min(unfolded.shape) <= EXACT:
        if unfolded.shape[0] < unfolded.shape[1]:
            # A = Rᵀ Qᵀ has the left directions of Rᵀ; Q, as large as A, is not made.
            unfolded = torch.linalg.qr(unfolded.t(), mode="r").R.t()
        return torch.linalg.svd(unfolded, full_matrices=False).U
    if unfolded.shape[0] <= unfolded.shape[1]:
        return torch.linalg.eigh(unfolded @ unfolded.t()).eigenvectors.flip(1)
    vectors = torch.linalg.eigh(unfolded.t() @ unfolded).eigenvectors.flip(1)
    return torch.linalg.qr(unfolded @ vectors).Q


def _turned(tensor: Tensor, axis: int, known: Tensor) -> Tensor:
    """As many leading directions along an axis as are known, or nearer to them than those are.

    Of a large unfolding A each step takes U to an orthonormal basis of A Aᵀ U, which never lowers
    what U keeps, ‖Uᵀ A‖.
    """
    unfolded = tensor.movedim(axis, 0).flatten(1)
    if min(unfolded.shape) <= EXACT:
        return leading(tensor, axis)[:, : known.shape[1]]
    for _ in range(POWERS):
        known = torch.linalg.qr(unfolded @ (unfolded.t() @ known)).Q
    return known


def _times(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """tensor ×_axis matrix [m, n]."""
    return torch.tensordot(matrix, tensor, dims=([1], [axis])).movedim(0, axis)


def _filled(tensor: Tensor, axis: int, known: Tensor | None, rank: int) -> Tensor:
    """``rank`` orthonormal directions along an axis: the known ones, then what the rest holds."""
    if known is not None and known.shape[1] == rank:
        return known
    if known is None:
        return leading(tensor, axis)[:, :rank]
    rest = tensor - _times(tensor, axis, known @ known.t())
    more = leading(rest, axis)[:, : rank - known.shape[1]]
    return torch.linalg.qr(torch.cat([known, more], 1)).Q


def _core(tensor: Tensor, factors: dict[int, Tensor]) -> Tensor:
    for axis, u in factors.items():
        tensor = _times(tensor, axis, u.t())
    return tensor


def _lost(tensor: Tensor, core: Tensor, factors: dict[int, Tensor]) -> float:
    """Squared error, from the difference: that of two norms would be rounding where it is small."""
    for axis, u in factors.items():
        core = _times(core, axis, u)
    return float(torch.linalg.vector_norm(tensor - core)) ** 2


# ** stacked weights **


@dataclass(frozen=True)
class Sizes:
    """Of a stack of matrices, and of its core.

    Attributes:
        stack: (E, R, C); ranks: (q, r, s), each at most the size; an axis that keeps it has no
            factor.
    """

    stack: tuple[int, int, int]
    ranks: tuple[int, int, int]

    @property
    def cut(self) -> tuple[bool, bool, bool]:
        """Whether matrices, rows, columns have a factor."""
        one, two, three = (k < n for k, n in zip(self.ranks, self.stack, strict=True))
        return one, two, three

    @property
    def dense(self) -> int:
        """Numbers of the stack."""
        return prod(self.stack)

    @property
    def numbers(self) -> int:
        """Numbers of the core and its factors."""
        sides = zip(self.stack, self.ranks, self.cut, strict=True)
        return prod(self.ranks) + sum(n * k for n, k, cut in sides if cut)


@dataclass(frozen=True)
class Stack:
    """W_e ≈ left · Σ_a mix[e, a] core_a · right, fp64; None where an axis is whole.

    Attributes:
        core: [q, r, s]; mix: [E, q]; left: [R, r], orthonormal columns; right: [s, C].
        dropped, whole: squared error and norm in the metric of the inputs.
        history: squared error of HOSVD and after each sweep.
    """

    core: Tensor
    mix: Tensor | None
    left: Tensor | None
    right: Tensor | None
    dropped: float
    whole: float
    history: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def dense(self) -> Tensor:
        """The stack [E, R, C] that it stands for, fp64."""
        out = self.core if self.mix is None else _times(self.core, 0, self.mix)
        out = out if self.left is None else self.left @ out
        return out if self.right is None else out @ self.right


def stack(weight: Tensor, root: Root, ranks: tuple[int, int, int], sweeps: int = SWEEPS) -> Stack:
    """The Tucker form of ``weight`` [E, R, C], errors counted as ``root`` says for the C inputs.

    The last axis is solved last and as a matrix, so that the root is never inverted, and directions
    that it does not see are kept by their size: whole ranks are lossless in any metric.
    Raises:
        UsageError, ModelError: as :func:`tucker`.
    """
    sizes = Sizes((weight.shape[0], weight.shape[1], weight.shape[2]), ranks)
    check_ranks(sizes.stack, ranks)
    rows = weight.double().flatten(0, 1)
    there = root.times(rows).unflatten(0, sizes.stack[:2])
    q, r, s = ranks
    seen = min(s, there.shape[2]) if sizes.cut[2] else there.shape[2]
    # A metric that sees few directions of the inputs tells few of the others too.
    most = (r * seen, q * seen)
    q, r = (min(k, m) if cut else k for k, m, cut in zip((q, r), most, sizes.cut, strict=False))
    found = tucker(there, (q, r, seen), sweeps)
    del there
    core, outer = rows.unflatten(0, sizes.stack[:2]), dict[int, Tensor]()
    for axis in (i for i in (0, 1) if sizes.cut[i]):
        outer[axis] = _filled(core, axis, found.factors[axis], ranks[axis])
        core = _times(core, axis, outer[axis].t())
    right, notes = None, root.notes
    if sizes.cut[2]:
        made = factor(core.flatten(0, 1), root, ranks[2])
        rows_of, right = made.factors
        core, notes = rows_of.unflatten(0, ranks[:2]), made.notes
    mix, left = (outer.get(i) for i in (0, 1))
    out = Stack(core, mix, left, right, 0.0, found.whole, found.history, notes)
    return replace(out, dropped=root.loss(rows - out.dense().flatten(0, 1)))


def even(stack: tuple[int, int, int], q: int, steps: tuple[int, int], most: int) -> Sizes:
    """The ranks of rows and columns that keep most even shares of both in ``most`` numbers.

    Args:
        q: rank of the matrices' axis; steps: ranks of rows and of columns are multiples of them, or
            whole.
    Raises:
        UsageError: one step of each is more.
    """
    menu = _menu(stack, q, steps, most)
    _, rows, columns = stack
    shares = torch.minimum(menu.r / rows, menu.s / columns)
    return menu.best(shares, fullest=True)


def kept(weight: Tensor, root: Root, q: int) -> Tensor:
    """What HOSVD keeps of ‖W S‖² with every rank of rows and columns: fp64 [R + 1, C + 1].

    In the bases of the HOSVD what a core keeps is the sum of its squares, so all pairs are sums of
    one table.
    Raises:
        ModelError: a number that is not finite.
    """
    _, r, c = weight.shape
    there = root.times(_finite(weight).flatten(0, 1)).unflatten(0, weight.shape[:2])
    whole = there
    if q < len(there):
        whole = _times(there, 0, leading(there, 0)[:, :q].t())
    bases = {i: leading(whole, i) for i in (1, 2)}
    table = _core(whole, bases).square().sum(0).cumsum(0).cumsum(1)
    out = table.new_zeros(r + 1, c + 1)
    down, across = (
        torch.arange(n + 1).clamp(max=k) for n, k in zip((r, c), table.shape, strict=True)
    )
    out[1:, 1:] = table[down[1:] - 1][:, across[1:] - 1]
    return out


def cheapest(
    stack: tuple[int, int, int], q: int, steps: tuple[int, int], most: int, kept: Tensor
) -> Sizes:  # fmt: skip
    """The ranks in ``most`` numbers of which HOSVD loses least; arguments as of :func:`even`."""
    menu = _menu(stack, q, steps, most)
    return menu.best(kept[menu.r, menu.s].cpu(), fullest=False)


@dataclass(frozen=True)
class _Menu:
    """Pairs of ranks of rows and columns that fit, int64 [n] each, and the numbers they take."""

    stack: tuple[int, int, int]
    q: int
    r: Tensor
    s: Tensor
    numbers: Tensor

    def best(self, worth: Tensor, *, fullest: bool) -> Sizes:
        """The pair that is worth most; of equal ones that with most numbers, or with fewest."""
        top = worth >= worth.max() - 1e-12 * worth.max().abs()
        count = self.numbers if fullest else -self.numbers
        at = int(torch.where(top, count, count.min() - 1).argmax())
        return Sizes(self.stack, (self.q, int(self.r[at]), int(self.s[at])))


def _menu(stack: tuple[int, int, int], q: int, steps: tuple[int, int], most: int) -> _Menu:
    count, rows, columns = stack
    r, s = (
        torch.tensor(sorted({*range(step, n, step), n}))
        for n, step in zip((rows, columns), steps, strict=True)
    )
    r, s = (t.flatten() for t in torch.meshgrid(r, s, indexing="ij"))
    numbers = q * r * s + (r < rows) * r * rows + (s < columns) * s * columns
    numbers = numbers + (count * q if q < count else 0)
    # A factor of more directions than the product of the others has nothing for them.
    real = ((r <= q * s) | (r == rows)) & ((s <= q * r) | (s == columns))
    fits = real & (numbers <= most)
    if not bool(fits.any()):
        least = int(numbers[real].min())
        dense = count * rows * columns
        raise UsageError(f"expected room for {least} of {dense} numbers, found {most}")
    return _Menu(stack, q, r[fits], s[fits], numbers[fits])
