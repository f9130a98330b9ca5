"""Where a static input grid ends: the size that keeps a share of the values, or that costs least.

Both read the histogram of :mod:`.magnitudes`, which follows folds, so that the size is that of the
values as they will be. Outliers beyond it are rounded to the end of the grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.errors import UsageError
from ..ir.ops.rounding import scale_of, snap
from ..ir.scheme import InputGrid
from .base import knob
from .magnitudes import OCTAVES, Magnitudes, edges, places

CLIPS = ("absmax", "percentile", "mse")
SHRINKS = tuple(2 ** (-i / 8) for i in range(81))
"""Shares of the largest value that the search tries."""
_PARTS = 64  # bins of an octave for a group's values together
_INSIDE = 4  # values that stand for those of a bin

KEPT = 99.99
"""Percentage of the values that act_clip=percentile keeps."""


def clip_knob() -> Any:
    """The knob ``act_clip`` of a pass with static scales."""
    return knob(
        "absmax",
        "where act=static ends: at the largest value that calibration saw, where it keeps a "
        "percentage of the values, or where the squared error is least",
        choices=CLIPS,
    )


def share_knob() -> Any:
    """The knob ``act_percentile`` beside it."""
    text = f"percentage of the values that act_clip=percentile keeps, {KEPT:g} unless told"
    return knob(None, text, lo=50, hi=100)


def static_grid(
    called: str, bits: int, per: str, kind: str, group: int | None, power: bool, clip: str,
    percentile: float | None,
) -> InputGrid:  # fmt: skip
    """The grid that the knobs act, act_clip and act_percentile of a pass ask for.

    Raises:
        UsageError: a clip without a static scale, or a percentile without that clip.
    """
    if clip != "absmax" and (per != "static" or kind == "pairs"):
        what = "act=static" if per != "static" else "integers or floats, for pairs clip nothing,"
        raise UsageError(f"{called}:act_clip: expected {what} beside it, found {clip}")
    if percentile is not None and clip != "percentile":
        raise UsageError(f"{called}:act_percentile: expected act_clip=percentile beside it")
    share = 0.0 if clip != "percentile" else KEPT if percentile is None else percentile
    return InputGrid(bits, per, kind, group, power, clip, share)


def clipped(
    seen: Magnitudes, size: Tensor, grid: InputGrid, columns: Tensor | None = None
) -> Tensor:
    """fp32 ``[G]``: where the grid ends for each group of channels.

    size: [G], the largest magnitude of each. columns: channels that are rounded nowhere.
    """
    ends, counts = seen.ends, seen.value.double()
    if columns is not None:
        counts = counts.index_fill(0, columns, 0.0)
    group = torch.arange(len(counts), device=counts.device) // _width(grid, len(counts))
    top = torch.frexp(size.double()).exponent.to(torch.int64)
    if grid.clip == "percentile":
        return _share(ends, counts, group, top, size, grid.percentile / 100)
    return _cheapest(ends, counts, group, top, size, grid)


def _width(grid: InputGrid, channels: int) -> int:
    return channels if grid.group is None else min(grid.group, channels)


def _together(values: Tensor, counts: Tensor, group: Tensor, top: Tensor) -> Tensor:
    """Counts ``[G, bins]`` of all channels of a group; values, counts: ``[n, b]``."""
    bins = 1 + OCTAVES * _PARTS
    at = places(values, top[group][:, None], _PARTS) + bins * group[:, None]
    out = counts.new_zeros(len(top) * bins).index_add_(0, at.view(-1), counts.reshape(-1))
    return out.view(len(top), bins)


def _share(
    ends: Tensor, counts: Tensor, group: Tensor, top: Tensor, size: Tensor, share: float
) -> Tensor:
    """The smallest end of a bin that at least ``share`` of the values do not pass."""
    # Just inside its upper end a bin's values are all counted, and never too early.
    upper = torch.nextafter(ends[:, 1:], ends.new_zeros(()))
    running = _together(upper, counts, group, top).cumsum(1)
    at = (running >= share * running[:, -1:] * (1 - 1e-12)).int().argmax(1)
    found = edges(top, _PARTS).gather(1, at[:, None] + 1)[:, 0]
    return torch.minimum(found.float(), size.float())


def _cheapest(
    ends: Tensor, counts: Tensor, group: Tensor, top: Tensor, size: Tensor, grid: InputGrid
) -> Tensor:
    """The size whose grid has the least squared error over the values."""
    low, wide = ends[:, 1:-1], ends[:, 1:].diff(dim=1)
    inside = (low + wide * ((i + 0.5) / _INSIDE) for i in range(_INSIDE))
    parts = [_together(x, counts[:, 1:] / _INSIDE, group, top) for x in inside]
    mass = torch.stack(parts).sum(0)
    fine = edges(top, _PARTS)
    middle = (fine[:, :-1] + fine[:, 1:]) / 2
    best, least = size.float(), torch.full_like(size, torch.inf, dtype=torch.float64)
    for shrink in SHRINKS:
        trial = size.float() * shrink
        scale = scale_of(trial, grid.kind, grid.bits, grid.power).double()[:, None]
        error = snap(middle / scale, grid.kind, grid.bits).mul_(scale).sub_(middle).square_()
        cost = (error * mass).sum(1)
        better = cost < least
        best, least = torch.where(better, trial, best), torch.where(better, cost, least)
    return best
