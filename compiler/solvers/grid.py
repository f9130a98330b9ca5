"""Uniform integer grids: how a group of weights becomes unsigned codes, a scale and a zero point.

``w = (q - zero) * scale`` with ``q`` in ``[0, 2**bits)``. A symmetric grid implies ``zero =
2**(bits-1)`` and stores none;
an asymmetric one stores an integer zero per group, and its range always contains 0, so that a
masked weight is exact.
Inside this module codes are *centred*: ``c = q - zero``. Arrays are transposed, ``[..., g, m]``:
``g`` inputs of one group
by ``m`` output rows, because the solvers walk over inputs and want each of them contiguous.

One protocol for every grid (`Grid` is the uniform one; tables.py, lut.py and bcq.py have siblings):
`fit` a group, `bounds` of a fit, `snap` values in units of the scale to what the grid can hold, and
`codes` of such values. The sweep, the refiner and round-to-nearest know no more than that.

Sources: GPTQ (arXiv 2210.17323) for the grid and the searched shrink; the symmetric absmax scale
here is
``absmax / (2**(bits-1) - 1/2)``, the smallest one whose error stays within half a step at both
ends of ``[-2**(b-1), 2**(b-1)-1]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ir.errors import UsageError
from .double import ScaleCodes, double_scales

Bounds = tuple[float, float] | tuple[Tensor, Tensor]
"""What `Grid.snap` needs to know of a fit: smallest and largest code; of a table, the midpoints
between levels and the levels, ascending."""

CLIPS = ("absmax", "mse", "percentile", "output")
OUTPUT_SHRINKS = tuple(1 - i / 20 for i in range(1, 10))
"""Factors of the range that clip="output" tries beside 1, as AWQ (arXiv 2306.00978) does."""

_CHUNK = 1 << 18  # weights
_FLOOR = 2.0**-100  # scales below this would make w / scale overflow fp32


class Fit(NamedTuple):
    """Scale ``[..., m]``, already rounded to its stored dtype, and zero ``[..., m]``.

    Both as floats; zero is None when the grid is symmetric. table: what a grid whose levels follow
    from the weights holds beside them, ``[1 or G, k, m or 1]``.
    """

    scale: Tensor
    zero: Tensor | None
    table: Tensor | None = None


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
    (14 candidates, weighted by the solver's column importance), ``"output"`` to search the one
    whose group of inputs costs least at the output. scale_dtype: the dtype that
    scales are stored in; codes
    are always rounded with the stored scale. Raises UsageError for anything else.
    """

    bits: int
    group: int | None = 128
    symmetric: bool = True
    clip: str = "absmax"
    scale_dtype: torch.dtype = torch.float16
    percentile: float = 99.9
    power: bool = False
    double: bool = False

    clips: ClassVar[tuple[str, ...]] = CLIPS
    scaled: ClassVar[bool] = True
    """Whether a scale is stored; else the levels are weights and every scale is 1."""

    def __post_init__(self) -> None:
        self._check_bits()
        if self.group is not None and self.group < 1:
            raise UsageError(f"grid group: expected None or at least 1, found {self.group}")
        if self.clip not in self.clips:
            raise UsageError(f"grid clip: expected one of {self.clips}, found {self.clip!r}")
        if not 50.0 < self.percentile <= 100.0:
            raise UsageError(f"grid percentile: expected 50 to 100, found {self.percentile}")
        if self.double and (self.power or self.scale_dtype != torch.float32):
            raise UsageError(
                "grid double: expected scale_dtype float32 and no power, for scales become 8-bit "
                f"codes, found {self.scale_dtype}, power={self.power}"
            )
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise UsageError(
                f"grid scale_dtype: expected a 16- or 32-bit float, found {self.scale_dtype}"
            )

    def _check_bits(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"grid bits: expected 2 to 8, found {self.bits}")

    @property
    def has_zero(self) -> bool:
        """Whether 0 is always a level, so that a masked weight has a code."""
        return True

    @property
    def whole(self) -> bool:
        """Whether scales or levels are fitted to the whole matrix before anything is rounded."""
        return self.double

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
        if self.power:
            mantissa, exponent = torch.frexp(real.double())
            up = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
            real = up.clamp(self.floor, 2.0 ** math.floor(math.log2(top))).to(self.scale_dtype)
        real = torch.where(scale > 0, real, torch.ones_like(real))
        return (real.double() / unit).to(scale.dtype)

    def bounds(self, zero: Tensor | None, table: Tensor | None = None) -> Bounds:
        """What `snap` needs to know of one group's (or all groups') zero point and table."""
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
        ``[..., g, 1]``, the weight of each input's squared error, or ``[..., g, g]``, that of
        each two inputs' errors (a diagonal block of XᵀX).
        """
        if keep is not None:
            w = w * keep
        if self.clip == "percentile":
            low, high = _percentiles(w, self.percentile / 100)
        else:
            low, high = torch.aminmax(w, dim=-2)
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        full = self.ranged(low, high, unit)
        if self.clip not in ("mse", "output"):
            return full
        best, best_cost = full, self._cost(w, full, importance)
        for shrink in OUTPUT_SHRINKS if self.clip == "output" else self._shrinks():
            trial = self.ranged(low * shrink, high * shrink, unit)
            cost = self._cost(w, trial, importance)
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            zero = None
            if trial.zero is not None and best.zero is not None:
                zero = torch.where(better, trial.zero, best.zero)
            best = Fit(torch.where(better, trial.scale, best.scale), zero)
        return best

    def _shrinks(self) -> list[float]:
        """Factors of the range that the searched clip tries beside 1."""
        top = self.implied_zero
        stride = 0.04 if self.bits > 3 else 0.05  # coarse grids clip harder
        return [(top - 0.5) / (top - 1), *(1.0 - stride * i for i in range(1, 13))]

    def ranged(self, low: Tensor, high: Tensor, unit: float = 1.0) -> Fit:
        """The fit whose ends are low <= 0 and high >= 0, ``[..., m]``, as stored."""
        if self.symmetric:
            top = torch.maximum(-low, high)
            return Fit(self.store(top / (self.implied_zero - 0.5), unit), None)
        scale = self.store((high - low) / (2**self.bits - 1), unit)
        return Fit(scale, torch.round(-low / scale).clamp_(0, 2**self.bits - 1))

    def _cost(self, w: Tensor, fit: Fit, importance: Tensor | None) -> Tensor:
        c = self.centred(w, fit)
        e = torch.addcmul(w, c, fit.scale.unsqueeze(-2), value=-1, out=c)
        if importance is not None and importance.shape[-1] > 1:
            return (importance @ e).mul_(e).sum(-2)
        e.square_()
        if importance is None:
            return e.sum(-2)
        return (importance.mT @ e).squeeze(-2)

    def centred(self, w: Tensor, fit: Fit) -> Tensor:
        """Centred codes (as floats) of w ``[..., g, m]``: values in units of the scale."""
        zero = None if fit.zero is None else fit.zero.unsqueeze(-2)
        units = w.div(fit.scale.unsqueeze(-2))
        return self.snap(units, self.bounds(zero, fit.table), units)

    def snap(self, values: Tensor, bounds: Bounds, out: Tensor) -> Tensor:
        """The nearest value of the grid to each of ``values``, in units of the scale, into out.

        Half a step goes to even. values: ``[m]`` or ``[..., g, m]``; out may be values itself.
        """
        return clamp_(torch.round(values, out=out), bounds)

    def codes(self, centred: Tensor, fit: Fit) -> Tensor:
        """Stored codes, uint8 ``[n, m]``, of snapped values ``centred`` [n, m]."""
        zero = fit.zero
        shift = self.implied_zero if zero is None else self.spread(zero, len(centred))
        return (centred + shift).to(torch.uint8)

    def stored(self, table: Tensor, unit: float = 1.0) -> Tensor:
        """`Fit.table`, times unit, as it is stored; decoding it gives the levels exactly."""
        raise TypeError(f"{type(self).__name__}: expected a grid with a table, found none")

    def decoded(self, codes: Tensor, table: Tensor, n: int) -> Tensor:
        """fp32 ``[n, m]`` weights of codes ``[n, m]`` where levels are weights; table as stored."""
        raise TypeError(f"{type(self).__name__}: expected a grid with a table, found none")

    def fit_whole(
        self,
        wt: Tensor,
        *,
        keep: Tensor | None = None,
        importance: Tensor | None = None,
        unit: float = 1.0,
    ) -> tuple[Fit, ScaleCodes | None]:
        """Fits ``[G, m]`` of all of ``wt`` [n, m], and the codes of the scales where `double`.

        importance: ``[n]``, or ``[n, m]`` where each weight has its own; with clip="output" XᵀX.
        """
        per_input = importance
        if per_input is not None and per_input.dim() == 2 and self.clip != "output":
            per_input = per_input.mean(1)
        fit = fits_t(wt, self, keep=keep, importance=per_input, unit=unit)
        if not self.double:
            return fit, None
        empty = group_absmax(wt if keep is None else wt * keep, self) == 0
        doubled = double_scales(fit.scale, empty, unit)
        zero = fit.zero
        scale = (doubled.decoded(*fit.scale.shape).double() / unit).to(fit.scale.dtype)
        return fit._replace(scale=scale, zero=zero), doubled


def at_group(table: Tensor | None, group: int) -> Tensor | None:
    """What one group reads of `Fit.table`: its own part, or the one that all share."""
    return None if table is None else table[group if len(table) > 1 else 0]


def clamp_(codes: Tensor, bounds: Bounds) -> Tensor:
    """Clamp centred codes in place to `Grid.bounds`."""
    low, high = bounds
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.clamp(codes, low, high, out=codes)
    if isinstance(low, float) and isinstance(high, float):
        return codes.clamp_(low, high)
    raise TypeError("bounds: expected two floats or two tensors")


def _percentiles(w: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Values of w ``[..., g, m]`` that ``share`` of its group lies above, and below."""
    ordered = w.sort(dim=-2).values
    at = share * (w.shape[-2] - 1)
    i, part = min(int(at), w.shape[-2] - 2), 0.0
    if w.shape[-2] == 1:
        return ordered[..., 0, :].clone(), ordered[..., 0, :].clone()
    part = at - i
    high = torch.lerp(ordered[..., i, :], ordered[..., i + 1, :], part)
    low = torch.lerp(ordered[..., -1 - i, :], ordered[..., -2 - i, :], part)
    return low, high


def _folded(x: Tensor, grid: Grid) -> Tensor:
    """``[n, m]`` -> ``[G, g, m]``; padded zeros never widen a range that includes 0."""
    n = len(x)
    g = n if grid.group is None else min(grid.group, n)
    pad = -n % g
    x = torch.nn.functional.pad(x, (0, 0, 0, pad)) if pad else x
    return x.reshape(-1, g, x.shape[1])


def _blocks(gram: Tensor, count: int, g: int) -> Tensor:
    """``[n, n]`` -> its diagonal blocks ``[count, g, g]``; the last may be padded with zeros."""
    pad = count * g - len(gram)
    wide = torch.nn.functional.pad(gram, (0, pad, 0, pad)) if pad else gram
    return torch.stack([wide[a : a + g, a : a + g] for a in range(0, count * g, g)])


def group_absmax(wt: Tensor, grid: Grid) -> Tensor:
    """Largest magnitude of each group of ``wt`` [n, m]: ``[G, m]``."""
    return _folded(wt, grid).abs().amax(1)


def fits_t(
    wt: Tensor,
    grid: Grid,
    *,
    keep: Tensor | None = None,
    importance: Tensor | None = None,
    unit: float = 1.0,
) -> Fit:
    """Fits ``[G, m]`` of transposed weights ``[n, m]``, each group by itself; as for `rtn_t`."""
    w = _folded(wt if keep is None else wt * keep, grid)
    count, g, m = w.shape
    weights = None
    if importance is not None and importance.dim() == 2:
        weights = _blocks(importance, count, g)
    elif importance is not None:
        weights = _folded(importance[:, None], grid)
    # some groups at a time, so that the search stays in the cache
    some = count if grid.clip == "absmax" else max(1, _CHUNK // (g * m))
    fits = []
    for a in range(0, count, some):
        part = None if weights is None else weights[a : a + some]
        fits.append(grid.fit(w[a : a + some], importance=part, unit=unit))
    zeros = [f.zero for f in fits if f.zero is not None]
    return Fit(torch.cat([f.scale for f in fits]), torch.cat(zeros) if zeros else None)


def rtn_t(
    wt: Tensor,
    grid: Grid,
    *,
    keep: Tensor | None = None,
    importance: Tensor | None = None,
    unit: float = 1.0,
    fit: Fit | None = None,
) -> tuple[Tensor, Tensor, Fit]:
    """Round transposed weights ``[n, m]`` to the nearest: values, centred codes, fits ``[G, m]``.

    keep: bool ``[n, m]``. importance: ``[n]``, or XᵀX ``[n, n]``. unit: see
    `Grid.store`. fit: already decided.
    """
    n, m = wt.shape
    if fit is None and grid.whole:
        fit = grid.fit_whole(wt, keep=keep, importance=importance, unit=unit)[0]
    if fit is None:
        fit = fits_t(wt, grid, keep=keep, importance=importance, unit=unit)
    c = grid.centred(_folded(wt if keep is None else wt * keep, grid), fit)
    if keep is not None and not grid.has_zero:
        c = c * _folded(keep, grid)
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
    codes = grid.codes(c, fit)
    return Rounded(value.t().contiguous(), codes.t().contiguous(), fit.scale.t().contiguous(), zero)
