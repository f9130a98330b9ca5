"""Numbers as constants of a kernel's source."""

from __future__ import annotations

import torch

from .problem import DTYPES


def integer_bytes(bits: int, x_dtype: str, part: str) -> list[int]:
    """The low or high bytes of 1 - 2**bits … 2**bits - 1 as floats, eight to an integer.

    The floats are bf16 for x in bf16, else fp16; 0 is the eighth number for 3 bits, so that no
    integer is negative.
    """
    top = (1 << bits) - 1
    half = DTYPES["bf16" if x_dtype == "bf16" else "fp16"]
    pattern = torch.arange(-top, top + 1).to(half).view(torch.int16).to(torch.int64) & 0xFFFF
    found = (pattern & 0xFF if part == "low" else pattern >> 8).tolist()
    eights = [found[i : i + 8] for i in range(0, len(found), 8)]
    return [sum(byte << (8 * i) for i, byte in enumerate(eight)) for eight in eights]


def integer_words(bits: int, x_dtype: str, part: str, less: int) -> list[int]:
    """The low or high bytes of 0 - less … 2**bits - 1 - less as floats, four to an int32."""
    run = sum(eight << (64 * i) for i, eight in enumerate(integer_bytes(bits, x_dtype, part)))
    run >>= 8 * ((1 << bits) - 1 - less)
    words = [(run >> (32 * i)) & 0xFFFFFFFF for i in range(max(1, (1 << bits) // 4))]
    return [w - (1 << 32) if w >> 31 else w for w in words]
