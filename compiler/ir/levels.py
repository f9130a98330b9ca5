"""Fixed levels by name: what the codes of a table grid stand for, in units of the scale.

    nf       NormalFloat of any width: quantiles of N(0, 1), one level more above 0 than below
    e2m1     4-bit float; e4m3 and e5m2: 8-bit floats. Codes are the float's own bits
    ternary  -1, 0, 1
    binary   -1, 1
    midrise  2**b evenly spaced levels around 0, none of them 0: ±1/2, ±3/2, …

Sources: QLoRA (arXiv 2305.14314) for nf; OCP Microscaling formats 1.0 for e2m1, OCP 8-bit floating
point for e4m3 and e5m2; BitNet b1.58 (arXiv 2402.17764) and BitNet (arXiv 2310.11453); QuIP (arXiv
2307.13304) for midrise.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .errors import UsageError

WIDTHS: dict[str, tuple[int, ...]] = {
    "nf": (2, 3, 4, 5, 6, 7, 8),
    "e2m1": (4,),
    "e4m3": (8,),
    "e5m2": (8,),
    "ternary": (2,),
    "binary": (1,),
    "midrise": (2, 3, 4, 5, 6, 7, 8),
}
"""Bits that each name can have."""

_FLOATS = {"e2m1": (2, 1), "e4m3": (4, 3), "e5m2": (5, 2)}


@cache
def levels(name: str, bits: int) -> Tensor:
    """fp32 ``[2**bits]``: the value of each code; NaN where a code stands for none.

    Raises:
        UsageError: no such levels.
    """
    if bits not in WIDTHS.get(name, ()):
        known = ", ".join(f"{n} ({'|'.join(map(str, w))})" for n, w in WIDTHS.items())
        raise UsageError(f"expected levels of {known} bits, found {name!r} with {bits}")
    if name == "nf":
        return normal_float(bits)
    if name in _FLOATS:
        return _floats(name)
    if name == "ternary":
        return torch.tensor([-1.0, 0.0, 1.0, torch.nan])
    if name == "midrise":
        return torch.arange(1 << bits).float() - ((1 << bits) - 1) / 2
    return torch.tensor([-1.0, 1.0])


def normal_float(bits: int) -> Tensor:
    """NormalFloat levels ``[2**bits]``, ascending from -1 to 1, exact 0 among them.

    ``2**(bits-1) - 1`` levels are negative and one more is positive. For 4 bits the outermost
    probability is QLoRA's 0.9677083; other widths follow the same rule.
    """
    half = 1 << (bits - 1)
    # Midway between the outermost quantiles of as many levels as each half would make of both.
    edge = 0.5 * ((1 - 1 / (4 * half)) + (1 - 1 / (2 * (2 * half - 1))))

    def upper(count: int) -> Tensor:
        p = torch.linspace(edge, 0.5, count + 1, dtype=torch.float64)[:-1]
        return torch.special.ndtri(p)

    positive, negative = upper(half), -upper(half - 1)
    both = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (both / both.abs().max()).float()


def _floats(name: str) -> Tensor:
    """The value of each bit pattern of a small float; inf and NaN are NaN."""
    exponent, mantissa = _FLOATS[name]
    bits = 1 + exponent + mantissa
    code = torch.arange(1 << bits, dtype=torch.int64)
    sign = 1.0 - 2.0 * (code >> (bits - 1)).double()
    e = (code >> mantissa) & ((1 << exponent) - 1)
    f = (code & ((1 << mantissa) - 1)).double() / (1 << mantissa)
    bias = (1 << (exponent - 1)) - 1
    small = f * 2.0 ** (1 - bias)
    normal = torch.ldexp(1 + f, e - bias)
    value = sign * torch.where(e == 0, small, normal)
    top = (1 << exponent) - 1
    if name == "e5m2":
        value[e == top] = torch.nan
    if name == "e4m3":
        value[(e == top) & (f == 1 - 1 / (1 << mantissa))] = torch.nan
    return value.float()
