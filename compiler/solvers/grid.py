"""Uniform integer grids: how a group of weights becomes unsigned codes, a scale and a zero point.

``w = (q - zero) * scale`` with ``q`` in ``[0, 2**bits)``. A symmetric grid implies ``zero =
2**(bits-1)`` and stores none;
an asymmetric one stores an integer zero per group, and its range always contains 0, so that a
masked weight is exact.
Inside this module codes are *centred*: ``c = q - zero``. Arrays are transposed, ``[..., g, m]``:
``g`` inputs of one group
by ``m`` output rows, because the solvers walk over inputs and want each of them contiguous.

Sources: GPTQ (arXiv 2210.17323) for the grid and the searched shrink; the symmetric absmax scale
here is
``absmax / (2**(bits-1) - 1/2)``, the smallest one whose error stays within half a step at both
ends of ``[-2**(b-1), 2**(b-1)-1]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ir.errors import UsageError

Bounds = tuple[float, float] | tuple[Tensor, Tensor]

_CHUNK = 1 << 18  # weights
_FLOOR = 2.0**-100  # scales below this would make w / scale overflow fp32


class Fit(NamedTuple):
    """Scale ``[..., m]``, already rounded to its stored dtype, and zero ``[..., m]``.

    Both as floats; zero is None when the grid is symmetric.
    """

    scale: Tensor
    zero: Tensor | None


class Rounded(NamedTuple):
    """A whole matrix on its grid.

    weight: fp ``[m, n]``; codes: uint8 ``[m, n]``; scale: ``[m, G]``; zero: uint8 ``[m, G]``
    or None.
    """

    weight: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True)
class Grid:
    """A uniform grid.

    bits: 2 to 8. group: inputs that share one scale, None = the whole row; the last group may
    be shorter.
    symmetric: no stored zero point. clip: ``"absmax"``, or ``"mse"`` to search the shrink of
    the range that costs least
    (14 candidates, weighted by the solver's column importance). scale_dtype: the dtype that
    scales are stored in; codes
    are always rounded with the stored scale. Raises UsageError for anything else.
    """

    bits: int
    group: int | None = 128
    symmetric: bool = True
    clip: str = "absmax"
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"grid bits: expected 2 to 8, found {self.bits}")
        if self.group is not None and self.group < 1:
            raise UsageError(f"grid group: expected None or at least 1, found {self.group}")
        if self.clip not in ("absmax", "mse"):
            raise UsageError(f"grid clip: expected 'absmax' or 'mse', found {self.clip!r}")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise UsageError(
                f"grid scale_dtype: expected a 16- or 32-bit float, found {self.scale_dtype}"
            )

    @property
    def implied_zero(self) -> int:
        """The zero point of a symmetric grid."""
        return int(2 ** (self.bits - 1))

    @property
    def floor(self) -> float:
        """The smallest scale that is ever stored."""
        info = torch.finfo(self.scale_dtype)
        return max(info.tiny * info.eps, _FLOOR)

    def spans(self, n: int) -> list[tuple[int, int]]:
        """The groups of a row of n inputs, as half-open ranges."""
        g = n if self.group is None else self.group
        return [(a, min(a + g, n)) for a in range(0, n, g)]

    def spread(self, per_group: Tensor, n: int) -> Tensor:
        """``[G, m]`` -> ``[n, m]``: each group's row for each of its inputs."""
        return per_group.repeat_interleave(self.group or n, 0)[:n]

    def store(self, scale: Tensor, unit: float = 1.0) -> Tensor:
        """Round ``scale * unit`` as it will be stored (finite and positive), then return
        it divided by unit again.

        unit is a power of two that the solver took out of extreme weights; scales of
        all-zero groups become 1.
        """
        top = float(torch.finfo(self.scale_dtype).max)
        real = (scale.double() * unit).clamp(self.floor, top).to(self.scale_dtype)
        real = torch.where(scale > 0, real, torch.ones_like(real))
        return (real.double() / unit).to(scale.dtype)

    def bounds(self, zero: Tensor | None) -> Bounds:
        """Smallest and largest centred code."""
        if zero is None:
            return float(-self.implied_zero), float(self.implied_zero - 1)
        return -zero, (2**self.bits - 1) - zero

    def fit(
        self,
        w: Tensor,
        *,
        keep: Tensor | None = None,
        importance: Tensor | None = None,
        unit: float = 1.0,
    ) -> Fit:
        """Fit scale and zero to w ``[..., g, m]`` over its group axis.

        keep: same shape, False for weights that a mask is expected to drop. importance:
        ``[..., g, 1]``, the weight of each input's squared error.
        """
        if keep is not None:
            w = w * keep
        low, high = torch.aminmax(w, dim=-2)
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        full = self._from_range(low, high, unit)
        if self.clip == "absmax":
            return full
        best, best_cost = full, self._cost(w, full, importance)
        top = self.implied_zero
        stride = 0.04 if self.bits > 3 else 0.05  # coarse grids clip harder
        shrinks = (1.0 - stride * i for i in range(1, 13))
        for shrink in ((top - 0.5) / (top - 1), *shrinks):
            trial = self._from_range(low * shrink, high * shrink, unit)
            cost = self._cost(w, trial, importance)
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            zero = None
            if trial.zero is not None and best.zero is not None:
                zero = torch.where(better, trial.zero, best.zero)
            best = Fit(torch.where(better, trial.scale, best.scale), zero)
        return best

    def _from_range(self, low: Tensor, high: Tensor, unit: float) -> Fit:
        if self.symmetric:
            top = torch.maximum(-low, high)
            return Fit(self.store(top / (self.implied_zero - 0.5), unit), None)
        scale = self.store((high - low) / (2**self.bits - 1), unit)
        return Fit(scale, torch.round(-low / scale).clamp_(0, 2**self.bits - 1))

    def _cost(self, w: Tensor, fit: Fit, importance: Tensor | None) -> Tensor:
        c = self.centred(w, fit)
        e = torch.addcmul(w, c, fit.scale.unsqueeze(-2), value=-1, out=c).square_()
        if importance is None:
            return e.sum(-2)
        return (importance.mT @ e).squeeze(-2)

    def centred(self, w: Tensor, fit: Fit) -> Tensor:
        """Centred codes (as floats) of w ``[..., g, m]``, rounded half to even."""
        zero = None if fit.zero is None else fit.zero.unsqueeze(-2)
        return clamp_(w.div(fit.scale.unsqueeze(-2)).round_(), self.bounds(zero))


def clamp_(codes: Tensor, bounds: Bounds) -> Tensor:
    """Clamp centred codes in place to `Grid.bounds`."""
    low, high = bounds
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.clamp(codes, low, high, out=codes)
    if isinstance(low, float) and isinstance(high, float):
        return codes.clamp_(low, high)
    raise TypeError("bounds: expected two floats or two tensors")


def rtn_t(
    wt: Tensor,
    grid: Grid,
    *,
    keep: Tensor | None = None,
    importance: Tensor | None = None,
    unit: float = 1.0,
) -> tuple[Tensor, Tensor, Fit]:
    """Round transposed weights ``[n, m]`` to the nearest: values, centred codes, fits ``[G, m]``.

    keep: bool ``[n, m]``. importance: ``[n]``. unit: see `Grid.store`.
    """
    n, m = wt.shape
    g = n if grid.group is None else min(grid.group, n)
    count = -(-n // g)
    pad = count * g - n

    def folded(x: Tensor) -> Tensor:  # padded zeros never widen a range that includes 0
        x = torch.nn.functional.pad(x, (0, 0, 0, pad)) if pad else x
        return x.reshape(count, g, -1)

    w = folded(wt if keep is None else wt * keep)
    weights = None if importance is None else folded(importance[:, None])
    # some groups at a time, so that the search stays in the cache
    some = count if grid.clip == "absmax" else max(1, _CHUNK // (g * m))
    fits = []
    for a in range(0, count, some):
        part = None if weights is None else weights[a : a + some]
        fits.append(grid.fit(w[a : a + some], importance=part, unit=unit))
    zeros = [f.zero for f in fits if f.zero is not None]
    fit = Fit(torch.cat([f.scale for f in fits]), torch.cat(zeros) if zeros else None)
    c = grid.centred(w, fit)
    value = (c * fit.scale.unsqueeze(1)).view(-1, m)[:n]
    return value, c.view(-1, m)[:n], fit


def rtn(
    weight: Tensor,
    grid: Grid,
    *,
    keep: Tensor | None = None,
    importance: Tensor | None = None,
) -> Rounded:
    """Round weight ``[m, n]`` to its nearest codes; masked entries (keep False) at the zero point.

    importance: ``[n]`` weights of the searched clip, e.g. diag(H).
    """
    wt = weight.t().contiguous()
    keep_t = None if keep is None else keep.t()
    value, c, fit = rtn_t(wt, grid, keep=keep_t, importance=importance)
    zero = None if fit.zero is None else fit.zero.t().to(torch.uint8).contiguous()
    shift = grid.implied_zero if fit.zero is None else grid.spread(fit.zero, len(wt))
    codes = (c + shift).to(torch.uint8)
    return Rounded(value.t().contiguous(), codes.t().contiguous(), fit.scale.t().contiguous(), zero)
