"""Canonical bit packing of codes: one dense little-endian bit stream per row, in int32 words.

Element ``i`` of a row occupies bits ``i*bits … i*bits+bits-1`` of that row's stream; bit ``k`` of
the stream is bit ``k % 32`` of word ``k // 32``. For 2, 4 and 8 bits this is the layout of the
compressed-tensors ``pack-quantized`` format, and for 3 bits its dense form of 2026-05.
"""

from __future__ import annotations

import torch

from .errors import ModelError

# Codes that are packed at once: the 64-bit words in between take 24 bytes for each.
_AT_ONCE = 1 << 20


def packed_words(columns: int, bits: int) -> int:
    """Number of int32 words that hold ``columns`` codes of ``bits`` bits."""
    return -(-columns * bits // 32)


def _rows_at_once(tensor: torch.Tensor) -> int:
    """Rows of the first axis to work on together, so that temporaries stay small."""
    return max(1, _AT_ONCE * tensor.shape[0] // max(tensor.numel(), 1)) if tensor.dim() > 1 else 0


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes [..., K], values in [0, 2**bits), into int32 [..., ceil(K*bits/32)].

    Raises:
        ModelError: a code is out of range.
    """
    rows = _rows_at_once(codes)
    if 0 < rows < codes.shape[0]:
        return torch.cat([pack(part, bits) for part in codes.split(rows)])
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ModelError(
            f"expected codes in [0, {1 << bits}), found [{int(codes.min())}, {int(codes.max())}]"
        )
    columns = codes.shape[-1]
    words = packed_words(columns, bits)
    out = torch.zeros(*codes.shape[:-1], words + 1, dtype=torch.int64, device=codes.device)
    start = torch.arange(columns, device=codes.device) * bits
    word, shift = start // 32, start % 32
    wide = codes.to(torch.int64) << shift
    out.index_add_(-1, word, wide & 0xFFFFFFFF)
    out.index_add_(-1, word + 1, wide >> 32)
    out = out[..., :words]
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`pack`: int32 [..., ceil(K*bits/32)] -> uint8 [..., K].

    Raises:
        ModelError: the number of words does not fit ``columns``.
    """
    if words.shape[-1] != packed_words(columns, bits):
        raise ModelError(
            f"expected {packed_words(columns, bits)} words for {columns} codes of {bits} bits, "
            f"found {words.shape[-1]}"
        )
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        spread = (words.unsqueeze(-1) >> shifts) & mask
        return spread.flatten(-2)[..., :columns].to(torch.uint8)
    start = torch.arange(columns, device=words.device) * bits
    word, shift = start // 32, start % 32
    wide = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    low, high = wide[..., word], wide[..., word + 1]
    return ((((high << 32) | low) >> shift) & mask).to(torch.uint8)


def nm_bits(m: int) -> int:
    """Bits that one kept position inside an M-block takes."""
    return max(1, (m - 1).bit_length())


def compress_nm(
    values: torch.Tensor, mask: torch.Tensor, n: int, m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the masked-in values of an N:M matrix.

    Args:
        values: [..., K], any dtype.
        mask: bool [..., K], exactly ``n`` True in each block of ``m``.
    Returns:
        (kept [..., K*n/m], meta int32 [..., words]): positions ascend inside each block.
    Raises:
        ModelError: a block that does not keep exactly ``n``.
    """
    rows = _rows_at_once(values)
    if 0 < rows < values.shape[0]:
        parts = zip(values.split(rows), mask.split(rows), strict=True)
        made = [compress_nm(v, keep, n, m) for v, keep in parts]
        return torch.cat([kept for kept, _ in made]), torch.cat([meta for _, meta in made])
    blocks = mask.unflatten(-1, (-1, m))
    if not bool((blocks.sum(-1) == n).all()):
        raise ModelError(
            f"expected exactly {n} kept values in each block of {m}, found another count"
        )
    where = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :n]
    kept = values.unflatten(-1, (-1, m)).gather(-1, where)
    return kept.flatten(-2), pack(where.flatten(-2), nm_bits(m))


def expand_nm(
    values: torch.Tensor, meta: torch.Tensor, n: int, m: int, columns: int
) -> torch.Tensor:
    """Scatter kept values [..., K*n/m] back to [..., K=columns]; the rest is exactly zero."""
    where = unpack(meta, nm_bits(m), columns // m * n).to(torch.int64).unflatten(-1, (-1, n))
    out = values.new_zeros(*values.shape[:-1], columns // m, m)
    return out.scatter(-1, where, values.unflatten(-1, (-1, n))).flatten(-2)
