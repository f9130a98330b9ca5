"""Outlier-victim pairs: an outlier takes the code of its neighbour too, which becomes 0.

Of two neighbours both are integers in two's complement, or one is marked by the code that integers
leave out and decodes to 0, and the other is a float whose exponent continues where integers end.
Source: OliVe (arXiv 2304.07493), whose floats are e2m1 beside 4 bits and e4m3 beside 8.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import packing
from ..dims import numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, llmc_op
from .compressed import groups_of

PAIR_BITS = (4, 8)
USUAL = 3 * math.sqrt(math.pi / 2)
"""Means of |x| that usual values reach: three deviations of a Gaussian with few outliers."""


@cache
def wide_values(bits: int) -> Tensor:
    """fp64 magnitudes of outliers by code; code 0 is not used, and with a sign marks the victim.

    4 bits: 12, 16, 24, 32, 48, 64, 96 by codes 1 to 7.
    """
    mantissa, bias = (1, 2) if bits == 4 else (3, 4)
    code = torch.arange(1 << (bits - 1))
    base = (1 << mantissa) + (code & ((1 << mantissa) - 1))
    return torch.ldexp(base.double(), (code >> mantissa) + bias)


def nearest_wide(size: Tensor, bits: int) -> Tensor:
    """Code of the nearest outlier magnitude to each of ``size`` >= 0, int64 from 1."""
    values = wide_values(bits)[1:].to(size)
    return torch.bucketize(size.detach().contiguous(), (values[1:] + values[:-1]) / 2) + 1


def round_pairs(x: Tensor, bits: int) -> Tensor:
    """Integers, or of two neighbours the larger as an outlier and the other as 0.

    Args:
        x: [..., n], n even, in units of the scale; 2i and 2i + 1 are a pair.
    Returns:
        Of each pair the answer whose squared error is smaller; integers where both are alike.
    """
    top = float((1 << (bits - 1)) - 1)
    pairs = x.unflatten(-1, (-1, 2))
    usual = pairs.round().clamp(-top, top)
    size = pairs.abs()
    first = size[..., :1] >= size[..., 1:]
    larger = torch.cat([first, ~first], -1)
    wide = wide_values(bits).to(x)[nearest_wide(size, bits)]
    wide = torch.where(larger, torch.copysign(wide, pairs.detach()), torch.zeros_like(pairs))
    gain = (pairs - usual).square().sum(-1) - (pairs - wide).square().sum(-1)
    return torch.where((gain > 0).unsqueeze(-1), wide, usual).flatten(-2)


def pair_codes(values: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [..., n], of what `round_pairs` gives."""
    half = 1 << (bits - 1)
    pairs = values.unflatten(-1, (-1, 2))
    outlier = pairs.abs() > half - 1
    code = pairs.to(torch.int64) & (2 * half - 1)
    wide = nearest_wide(pairs.abs(), bits) + half * (pairs < 0)
    code = torch.where(outlier, wide, torch.where(outlier.flip(-1), half, code))
    return code.flatten(-2).to(torch.uint8)


def _type(
    codes: TensorType, scale: TensorType, *, bits: int, group: int, columns: int,
    dtype: torch.dtype = torch.float32,
) -> TensorType:  # fmt: skip
    if bits not in PAIR_BITS or columns % 2 or group % 2:
        raise ModelError(
            f"expected pairs of 4 or 8 bits in even groups of even columns, found {bits} bits, "
            f"{group}, {columns}"
        )
    words, groups = packing.packed_words(columns, bits), groups_of(columns, group)
    if codes.rank != 2 or codes.dtype != torch.int32 or not same(codes.shape[-1], words):
        raise ModelError(f"expected codes i32[N, {words}] for {columns} columns, found {codes}")
    if scale.shape != (codes.shape[0], groups):
        raise ModelError(f"expected scale [N, {groups}] beside {codes}, found {scale}")
    return TensorType((codes.shape[0], columns), dtype)


def decode_pairs(
    codes: Tensor, scale: Tensor, *, bits: int, group: int, columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Integers and outliers of each pair, times the scale of their group.

    Args:
        codes: int32 [N, words], packed rows; scale: [N, G].
    Returns:
        [N, columns] in ``dtype``; computed at least in fp32.
    """
    wide = torch.promote_types(torch.float32, scale.dtype)
    half = 1 << (bits - 1)
    code = packing.unpack(codes, bits, columns).to(torch.int64).unflatten(-1, (-1, 2))
    victim = code == half
    usual = (code - 2 * half * (code >= half)).to(wide)
    sign = 1.0 - 2.0 * (code >= half).to(wide)
    outlier = sign * wide_values(bits).to(usual)[code & (half - 1)]
    value = torch.where(victim.flip(-1), outlier, usual).masked_fill(victim, 0.0).flatten(-2)
    which = torch.arange(columns, device=codes.device) // group
    return (value * scale.to(wide)[:, which]).to(dtype)


def broken_pairs(codes: Tensor, bits: int, columns: int) -> int:
    """Pairs that stand for nothing: two victims, or an outlier without a magnitude."""
    half = 1 << (bits - 1)
    code = packing.unpack(codes, bits, columns).to(torch.int64).unflatten(-1, (-1, 2))
    return int(((code == half) & ((code.flip(-1) & (half - 1)) == 0)).any(-1).sum())


def _ties(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    return [Tie("same", ((0, 0), (1, 0)), (0,)), Tie("mix", ((0, 1), (1, 1)), (1,))]


def _samples() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    scale = torch.rand(3, 2, generator=g, dtype=torch.float64)
    values = round_pairs(8 * torch.randn(3, 8, generator=g, dtype=torch.float64), 4)
    codes = packing.pack(pair_codes(values, 4), 4)
    return [((codes, scale), {"bits": 4, "group": 4, "columns": 8, "dtype": torch.float64})]


llmc_op(
    "decode_pairs",
    "(Tensor codes, Tensor scale, *, int bits, int group, int columns, ScalarType dtype=float) "
    "-> Tensor",
    _type,
    decode_pairs,
    ties=_ties,
    flops=lambda out, *t, **a: 2 * numel(out.shape),
    samples=_samples,
)
