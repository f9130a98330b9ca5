"""What passes may ask to know about a value, how parts merge, and how it follows a rewrite.

Every statistic is over rows of x [tokens, n]. ``merge`` makes streaming, ranks and one shot agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..ir.errors import LlmcError, UsageError, nearest
from .magnitudes import Magnitudes

S = TypeVar("S", bound="Statistic")


class Statistic(Protocol):
    """A running statistic of the channels of one value."""

    name: ClassVar[str]
    scope: ClassVar[str]
    tokens: int

    def update(self, x: Tensor) -> None:
        """Add rows x [tokens, n]."""

    def merge(self: S, other: S) -> None:
        """Add what another part of the calibration saw."""

    def scaled(self: S, factor: Tensor) -> S:
        """The statistic of x · factor [n] (a fold)."""
        ...

    def taken(self: S, index: Tensor) -> S:
        """The statistic of x[:, index] (a permutation or a slice)."""
        ...


@dataclass
class AbsMax:
    """max over tokens of |x| per channel: ``value`` [n], fp32."""

    name: ClassVar[str] = "absmax"
    scope: ClassVar[str] = "block"
    value: Tensor | None = None
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        top = x.abs().amax(0).float()
        self.value = top if self.value is None else torch.maximum(self.value, top)
        self.tokens += x.shape[0]

    def merge(self, other: AbsMax) -> None:
        if other.value is not None:
            self.value = (
                other.value if self.value is None else torch.maximum(self.value, other.value)
            )
        self.tokens += other.tokens

    def scaled(self, factor: Tensor) -> AbsMax:
        return AbsMax(_have(self.value) * factor.abs().float(), self.tokens)

    def taken(self, index: Tensor) -> AbsMax:
        return AbsMax(_have(self.value)[index], self.tokens)


@dataclass
class AbsMean:
    """mean over tokens of |x| per channel; ``total`` [n] is the sum."""

    name: ClassVar[str] = "absmean"
    scope: ClassVar[str] = "block"
    total: Tensor | None = None
    tokens: int = 0

    @property
    def value(self) -> Tensor:
        return _have(self.total) / max(self.tokens, 1)

    def update(self, x: Tensor) -> None:
        part = x.abs().float().sum(0)
        self.total = part if self.total is None else self.total + part
        self.tokens += x.shape[0]

    def merge(self, other: AbsMean) -> None:
        if other.total is not None:
            self.total = other.total if self.total is None else self.total + other.total
        self.tokens += other.tokens

    def scaled(self, factor: Tensor) -> AbsMean:
        return AbsMean(_have(self.total) * factor.abs().float(), self.tokens)

    def taken(self, index: Tensor) -> AbsMean:
        return AbsMean(_have(self.total)[index], self.tokens)


@dataclass
class Range:
    """min and max over tokens per channel: ``low`` and ``high`` [n], fp32."""

    name: ClassVar[str] = "range"
    scope: ClassVar[str] = "block"
    low: Tensor | None = None
    high: Tensor | None = None
    tokens: int = 0

    @property
    def value(self) -> Tensor:
        """Both ends [2, n]."""
        return torch.stack([_have(self.low), _have(self.high)])

    def update(self, x: Tensor) -> None:
        low, high = x.aminmax(dim=0)
        self.merge(Range(low.float(), high.float(), x.shape[0]))

    def merge(self, other: Range) -> None:
        if other.low is not None and other.high is not None:
            self.low = other.low if self.low is None else torch.minimum(self.low, other.low)
            self.high = other.high if self.high is None else torch.maximum(self.high, other.high)
        self.tokens += other.tokens

    def scaled(self, factor: Tensor) -> Range:
        ends = self.value * factor.float()
        return Range(ends.amin(0), ends.amax(0), self.tokens)

    def taken(self, index: Tensor) -> Range:
        return Range(_have(self.low)[index], _have(self.high)[index], self.tokens)


@dataclass
class Sample:
    """Evenly spaced rows of x, at most ``MOST``: ``value`` [k, n], fp32.

    Row i is kept where i is a multiple of ``stride``, which doubles when there are too many: what
    is kept depends on the rows and not on how they come in.
    """

    name: ClassVar[str] = "sample"
    scope: ClassVar[str] = "block"
    MOST: ClassVar[int] = 512
    rows: Tensor | None = None
    tokens: int = 0
    stride: int = 1

    @property
    def value(self) -> Tensor:
        return _have(self.rows)

    def update(self, x: Tensor) -> None:
        self._add(x[-self.tokens % self.stride :: self.stride].float())
        self.tokens += x.shape[0]

    def _add(self, rows: Tensor) -> None:
        kept = rows if self.rows is None else torch.cat([self.rows, rows])
        while len(kept) > self.MOST:
            kept, self.stride = kept[::2], 2 * self.stride
        self.rows = kept.clone()

    def merge(self, other: Sample) -> None:
        if other.rows is not None:
            self._add(other.rows)
        self.tokens += other.tokens

    def scaled(self, factor: Tensor) -> Sample:
        return Sample(self.value * factor.float(), self.tokens, self.stride)

    def taken(self, index: Tensor) -> Sample:
        return Sample(self.value[:, index], self.tokens, self.stride)


@dataclass
class Moments:
    """Mean and variance per channel by the parallel update of Chan et al. (1979), fp64."""

    name: ClassVar[str] = "moments"
    scope: ClassVar[str] = "block"
    mean: Tensor | None = None
    square: Tensor | None = None
    tokens: int = 0

    @property
    def variance(self) -> Tensor:
        return _have(self.square) / max(self.tokens, 1)

    def update(self, x: Tensor) -> None:
        wide = x.double()
        mean = wide.mean(0)
        self.merge(Moments(mean, (wide - mean).pow(2).sum(0), x.shape[0]))

    def merge(self, other: Moments) -> None:
        if other.mean is None or other.square is None:
            return
        if self.mean is None or self.square is None:
            self.mean, self.square, self.tokens = other.mean, other.square, other.tokens
            return
        total = self.tokens + other.tokens
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.tokens / total)
        self.square = self.square + other.square
        self.square = self.square + delta.pow(2) * (self.tokens * other.tokens / total)
        self.tokens = total

    def scaled(self, factor: Tensor) -> Moments:
        f = factor.double()
        return Moments(_have(self.mean) * f, _have(self.square) * f.pow(2), self.tokens)

    def taken(self, index: Tensor) -> Moments:
        return Moments(_have(self.mean)[index], _have(self.square)[index], self.tokens)


@dataclass
class Gram:
    """XᵀX [n, n], accumulated in fp32 (fp64 for fp64 inputs); updated in place, never shared."""

    name: ClassVar[str] = "gram"
    scope: ClassVar[str] = "block"
    value: Tensor | None = None
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        if self.value is None:
            self.value = x.new_zeros(x.shape[1], x.shape[1])
        self.value.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def merge(self, other: Gram) -> None:
        if other.value is not None:
            self.value = other.value + (0 if self.value is None else self.value)
        self.tokens += other.tokens

    def scaled(self, factor: Tensor) -> Gram:
        g = _have(self.value)
        f = factor.to(g.dtype)
        return Gram(g * f[:, None] * f[None, :], self.tokens)

    def taken(self, index: Tensor) -> Gram:
        return Gram(_have(self.value)[index][:, index], self.tokens)


@dataclass
class WideGram(Gram):
    """XᵀX accumulated in fp64: squaring in fp32 would lose the small directions."""

    name: ClassVar[str] = "gram64"

    def update(self, x: Tensor) -> None:
        super().update(x.double())


@dataclass
class Fisher:
    """Diagonal Fisher information Σ over samples of (∂loss/∂w)², per weight; by the reverse sweep.

    Held per parameter (not per channel), so a fold scales it and a permutation reorders columns.
    """

    name: ClassVar[str] = "fisher"
    scope: ClassVar[str] = "reverse"
    value: Tensor | None = None
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        """Add one sample's gradient, of the weight's own shape."""
        part = x.float().pow(2) if x.dtype != torch.float64 else x.pow(2)
        self.value = part if self.value is None else self.value + part
        self.tokens += 1

    def merge(self, other: Fisher) -> None:
        if other.value is not None:
            self.value = other.value if self.value is None else self.value + other.value
        self.tokens += other.tokens

    def scaled(self, factor: Tensor) -> Fisher:
        """For x · factor the weight becomes w / factor, so its gradient is multiplied by factor."""
        return Fisher(_have(self.value) * factor.pow(2), self.tokens)

    def taken(self, index: Tensor) -> Fisher:
        return Fisher(_have(self.value)[..., index], self.tokens)


def _have(value: Tensor | None) -> Tensor:
    if value is None:
        raise LlmcError("expected a statistic that saw tokens, found none (dead hook)")
    return value


KINDS: dict[str, type] = {
    k.name: k for k in (AbsMax, AbsMean, Magnitudes, Range, Sample, Moments, Gram, WideGram, Fisher)
}


def kind(name: str) -> type:
    """The statistic of that name; UsageError when unknown."""
    if name not in KINDS:
        raise UsageError(f"expected a statistic, found {name!r}", hint=nearest(name, KINDS))
    return KINDS[name]


@dataclass
class Collection:
    """Statistics of one segment: by value node name and statistic name."""

    data: dict[tuple[str, str], Statistic] = field(default_factory=dict)

    def want(self, value: str, name: str) -> None:
        """Declare a need; several passes may share one statistic."""
        self.data.setdefault((value, name), kind(name)())

    def values(self) -> set[str]:
        return {v for v, _ in self.data}

    def update(self, value: str, x: Tensor) -> None:
        """Feed x [..., n] of that value to every statistic that wants it."""
        rows = x.reshape(-1, x.shape[-1])
        for (node, _), stat in self.data.items():
            if node == value:
                stat.update(rows)

    def get(self, value: str, name: str) -> Statistic:
        """The statistic, which must have seen tokens.

        Raises:
            LlmcError: it saw none: a dead hook.
        """
        stat = self.data[value, name]
        if stat.tokens == 0:
            raise LlmcError(f"expected statistic {name} of {value} to see tokens, found none")
        return stat

    def scale(self, value: str, factor: Tensor) -> None:
        """Follow a fold: x of that value becomes x · factor [n]."""
        for key, stat in self.data.items():
            if key[0] == value:
                self.data[key] = stat.scaled(factor)
