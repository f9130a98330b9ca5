"""How large the values of each channel are: a histogram of |x| whose bins are octaves in parts.

A channel's range is a power of two above all that it saw; it doubles when a larger value comes,
and its lowest octave is then counted as nothing. Bins of one range are whole bins of the doubled
one, so that counts depend on the values and not on how they come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.errors import LlmcError

OCTAVES = 24
"""Octaves below a channel's range that are told apart; what is smaller is counted together."""
PARTS = 16
"""Bins of an octave, equally wide."""
_LOWEST = -126
_CHUNK = 1 << 20


def places(x: Tensor, top: Tensor, parts: int = PARTS) -> Tensor:
    """int64 like x: the bin of each value, not negative and below ``2**top``, exactly.

    Bin 0 holds all below ``2**(top - OCTAVES)``.
    """
    mantissa, exponent = torch.frexp(x)
    octave = exponent.to(torch.int64) - top + OCTAVES - 1
    bins = 1 + octave * parts + ((2 * mantissa - 1) * parts).long()
    return torch.where((octave < 0) | (x <= 0), 0, bins).clamp_(max=OCTAVES * parts)


def edges(top: Tensor, parts: int = PARTS) -> Tensor:
    """Ends of the bins of ranges ``top``, fp64 ``[..., 2 + OCTAVES * parts]``, ascending from 0."""
    at = torch.arange(OCTAVES * parts, device=top.device)
    steps = torch.ldexp(1.0 + (at % parts).double() / parts, at // parts - OCTAVES)
    steps = torch.cat([steps.new_zeros(1), steps, steps.new_ones(1)])
    return torch.ldexp(torch.ones_like(top, dtype=torch.float64), top)[..., None] * steps


@dataclass
class Magnitudes:
    """``counts`` int64 ``[n, 1 + OCTAVES * PARTS]`` of |x| per channel, below ``2**top`` [n].

    factor: [n], what a fold multiplied the channels by since; None = nothing.
    """

    name: ClassVar[str] = "magnitudes"
    scope: ClassVar[str] = "block"
    counts: Tensor | None = None
    top: Tensor | None = None
    factor: Tensor | None = None
    tokens: int = 0

    @property
    def value(self) -> Tensor:
        return self._have()[0]

    @property
    def ends(self) -> Tensor:
        """fp64 ``[n, 2 + OCTAVES * PARTS]``, ends of each channel's bins."""
        found = edges(self._have()[1])
        return found if self.factor is None else found * self.factor.double()[:, None]

    def update(self, x: Tensor) -> None:
        size = x.abs().float()
        top = _range(size.amax(0))
        if self.top is not None:
            top = torch.maximum(top, self.top)
        n, bins = size.shape[1], 1 + OCTAVES * PARTS
        counts = torch.zeros(n * bins, dtype=torch.int64, device=size.device)
        # Some rows at a time, for places take several times the room of the values.
        for rows in size.split(max(1, _CHUNK // n)):
            at = places(rows, top) + bins * torch.arange(n, device=size.device)
            counts += torch.bincount(at.view(-1), minlength=n * bins)
        self.merge(Magnitudes(counts.view(n, bins), top, self.factor, x.shape[0]))

    def merge(self, other: Magnitudes) -> None:
        if other.counts is None or other.top is None:
            return
        if self.counts is None or self.top is None:
            self.counts, self.top, self.factor = other.counts, other.top, other.factor
        else:
            top = torch.maximum(self.top, other.top)
            self.counts = _within(self.counts, self.top, top) + _within(
                other.counts, other.top, top
            )
            self.top = top
        self.tokens += other.tokens

    def scaled(self, factor: Tensor) -> Magnitudes:
        counts, top = self._have()
        whole = factor.abs() if self.factor is None else self.factor * factor.abs()
        return Magnitudes(counts, top, whole, self.tokens)

    def taken(self, index: Tensor) -> Magnitudes:
        counts, top = self._have()
        factor = None if self.factor is None else self.factor[index]
        return Magnitudes(counts[index], top[index], factor, self.tokens)

    def _have(self) -> tuple[Tensor, Tensor]:
        if self.counts is None or self.top is None:
            raise LlmcError("expected a statistic that saw tokens, found none (dead hook)")
        return self.counts, self.top


def _range(peak: Tensor) -> Tensor:
    """int64 like peak: the smallest power of two above it, as its exponent."""
    exponent = torch.frexp(peak).exponent.to(torch.int64)
    return torch.where(peak > 0, exponent, _LOWEST).clamp_(min=_LOWEST)


def _within(counts: Tensor, top: Tensor, wider: Tensor) -> Tensor:
    """Counts of ranges ``top`` as those of ranges that are not smaller."""
    if torch.equal(top, wider):
        return counts
    at = torch.arange(counts.shape[1], device=counts.device) - PARTS * (wider - top)[:, None]
    return torch.zeros_like(counts).scatter_add_(1, at.clamp_(min=0), counts)
