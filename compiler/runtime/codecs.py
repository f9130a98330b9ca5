"""How keys or values become codes and come back: one class per grid, all with one interface.

``encode`` takes [B, KV, T, D] in floating point and gives parts [B, *, T / step, *]; ``decode``
gives the numbers back. Scales are f16, rounded so that the grid still covers what it was made for;
then |x - x̂| <= s / 2 holds for the stored scale s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..ir.caches import CacheScheme, outlier_count
from ..ir.packing import pack, packed_words, unpack

_LARGEST = 65504.0
# Smallest scale: of a constant group, whose range is 0.
_TINY = 2.0**-24


@dataclass(frozen=True)
class Part:
    """One stored tensor [B, rows, T / step, columns]."""

    rows: int
    columns: int
    dtype: torch.dtype
    step: int = 1


class Codec(Protocol):
    """A grid for keys or values; ``step`` tokens are encoded together."""

    step: int

    def parts(self, heads: int, channels: int) -> list[Part]:
        """What is stored."""
        ...

    def apart(self, x: Tensor) -> Tensor | None:
        """bool like x: numbers that are kept apart and exact; None where the grid takes all."""
        ...

    def encode(self, x: Tensor, apart: Tensor | None) -> list[Tensor]:
        """The parts of x [B, KV, T, D]; ``apart`` says what does not count."""
        ...

    def decode(self, parts: Sequence[Tensor], channels: int, dtype: torch.dtype) -> Tensor:
        """x̂ [B, KV, T, D] of the parts."""
        ...


def below(x: Tensor) -> Tensor:
    """The largest f16 that is not above x, within f16's range."""
    x = x.clamp(-_LARGEST, _LARGEST)
    half = x.half()
    bits = half.view(torch.int16)
    # The next one down: one less in magnitude above 0, one more below; under 0 the smallest.
    down = torch.where(half > 0, bits - 1, bits + 1).masked_fill(half == 0, -32767)
    return torch.where(half.to(x.dtype) > x, down.view(torch.float16), half)


def above(x: Tensor) -> Tensor:
    """The smallest f16 that is not below x, within f16's range."""
    return -below(-x)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _All:
    step = 1

    def apart(self, x: Tensor) -> Tensor | None:
        return None


class Symmetric(_All):
    """int8 or e4m3 codes times a scale: per token and head, or a stored one per channel [KV, D]."""

    def __init__(self, kind: str, scale: Tensor | None = None) -> None:
        self.dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        self.top = 127.0 if kind == "int8" else 448.0
        self.scale = scale

    def parts(self, heads: int, channels: int) -> list[Part]:
        codes = Part(heads, channels, self.dtype)
        return [codes] if self.scale is not None else [codes, Part(heads, 1, torch.float16)]

    def encode(self, x: Tensor, apart: Tensor | None) -> list[Tensor]:
        wide = x.to(_wide(x.dtype))
        if self.scale is not None:
            return [self._codes(wide, self.scale[:, None])]
        scale = above((wide.abs().amax(-1, keepdim=True) / self.top).clamp_min(_TINY))
        return [self._codes(wide, scale), scale]

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        found = (x / scale.to(x.dtype)).clamp(-self.top, self.top)
        return (found.round() if self.dtype == torch.int8 else found).to(self.dtype)

    def decode(self, parts: Sequence[Tensor], channels: int, dtype: torch.dtype) -> Tensor:
        scale = parts[1] if self.scale is None else self.scale[:, None]
        wide = _wide(dtype)
        return (parts[0].to(wide) * scale.to(wide)).to(dtype)


class Asymmetric(_All):
    """q·s + m with s and m from the range of a group (KIVI).

    A group is ``tokens`` tokens of one channel, or ``channels`` channels of one token.
    """

    def __init__(self, bits: int, *, tokens: int = 1, channels: int = 1) -> None:
        self.bits, self.step, self.group = bits, tokens, channels

    def parts(self, heads: int, channels: int) -> list[Part]:
        of = Part(heads, channels // self.group, torch.float16, self.step)
        return [Part(heads, packed_words(channels, self.bits), torch.int32), of, of]

    def _grouped(self, x: Tensor) -> Tensor:
        """[B, KV, T / step, step, D / group, group]."""
        return x.unflatten(2, (-1, self.step)).unflatten(4, (-1, self.group))

    def encode(self, x: Tensor, apart: Tensor | None) -> list[Tensor]:
        groups = self._grouped(x.to(_wide(x.dtype)))
        low = below(groups.amin((3, 5), keepdim=True))
        top = float((1 << self.bits) - 1)
        base = low.to(groups.dtype)
        spread = (groups.amax((3, 5), keepdim=True) - base) / top
        scale = above(spread.clamp_min(_TINY))
        codes = ((groups - base) / scale.to(groups.dtype)).round().clamp(0, top)
        packed = pack(codes.to(torch.int64).flatten(4).flatten(2, 3), self.bits)
        return [packed, scale.flatten(4).flatten(2, 3), low.flatten(4).flatten(2, 3)]

    def decode(self, parts: Sequence[Tensor], channels: int, dtype: torch.dtype) -> Tensor:
        wide = _wide(dtype)
        codes = self._grouped(unpack(parts[0], self.bits, channels).to(wide))
        scale, low = (p.to(wide)[:, :, :, None, :, None] for p in parts[1:])
        return (codes * scale + low).flatten(4).flatten(2, 3).to(dtype)


class Levels:
    """Levels of a table in a range (KVQuant).

    The range is stored per channel, [2, KV, D] of lows and highs, and what lies outside is kept
    apart; or it is each token's own over all heads, without its ``count`` lowest and highest.
    levels: f32 [2, 2**bits] in [-1, 1]: by the first row codes are chosen, the second is read.
    """

    step = 1

    def __init__(
        self, bits: int, levels: Tensor, span: Tensor | None = None, count: int = 0
    ) -> None:
        self.bits, self.levels, self.count, self.span = bits, levels, count, span

    def parts(self, heads: int, channels: int) -> list[Part]:
        codes = Part(heads, packed_words(channels, self.bits), torch.int32)
        return [codes] if self.span is not None else [codes, Part(1, 2, torch.float16)]

    def apart(self, x: Tensor) -> Tensor | None:
        if self.span is not None:
            if not self.count:
                return None
            low, high = self.span.to(_wide(x.dtype))[:, :, None]
            return (x < low) | (x > high)
        if not self.count:
            return None
        rows = x.transpose(1, 2).flatten(2)
        out = torch.zeros_like(rows, dtype=torch.bool)
        for largest in (False, True):
            out.scatter_(-1, rows.topk(self.count, -1, largest=largest).indices, True)
        return out.unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2)

    def encode(self, x: Tensor, apart: Tensor | None) -> list[Tensor]:
        wide = x.to(_wide(x.dtype))
        if self.span is not None:
            low, high = self.span.to(wide.dtype)[:, :, None]
            return [self._codes((wide - low) * (2 / (high - low)) - 1)]
        out = torch.zeros_like(wide, dtype=torch.bool) if apart is None else apart
        low = below(wide.masked_fill(out, torch.inf).amin((1, 3), keepdim=True))
        high = above(wide.masked_fill(out, -torch.inf).amax((1, 3), keepdim=True))
        base, width = low.to(wide.dtype), (high.to(wide.dtype) - low.to(wide.dtype))
        codes = self._codes((wide - base) * (2 / width.clamp_min(_TINY)) - 1)
        return [codes, torch.cat([low, high], -1)]

    def _codes(self, x: Tensor) -> Tensor:
        centres = self.levels[0].to(x.dtype)
        at = torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)
        return pack(at, self.bits)

    def decode(self, parts: Sequence[Tensor], channels: int, dtype: torch.dtype) -> Tensor:
        wide = _wide(dtype)
        found = self.levels[1].to(wide)[unpack(parts[0], self.bits, channels).long()]
        if self.span is not None:
            low, high = self.span.to(wide)[:, :, None]
        else:
            low, high = parts[1].to(wide).split(1, -1)
        return (low + (found + 1) * ((high - low) / 2)).to(dtype)


def codecs(
    scheme: CacheScheme, tensors: dict[str, Tensor], heads: int, v: int
) -> tuple[Codec, Codec]:
    """The grids of keys and values; tensors by part, see ``CacheScheme.tensors``."""
    if scheme.kind == "kivi":
        assert scheme.group is not None
        return (
            Asymmetric(scheme.bits, tokens=scheme.group),
            Asymmetric(scheme.bits, channels=scheme.value_group(v)),
        )
    if scheme.kind == "kvquant":
        count = outlier_count(scheme.outliers, heads * v)
        return (
            Levels(scheme.bits, tensors["key_levels"], tensors["key_range"], count),
            Levels(scheme.bits, tensors["value_levels"], None, count),
        )
    return Symmetric(scheme.kind, tensors.get("key_scale")), Symmetric(scheme.kind)
