"""Blocks of 32 weights as GGUF stores them, from codes as they are: nothing is quantised again.

    Q4_0  fp16 d, 16 bytes            d·(q - 8)
    Q4_1  fp16 d, fp16 m, 16 bytes    d·q + m
    Q5_0  fp16 d, 4 bytes of fifth bits, 16 bytes      d·(q - 16)
    Q5_1  fp16 d, fp16 m, 4 bytes of fifth bits, 16 bytes   d·q + m
    Q8_0  fp16 d, 32 int8             d·q

Byte j of the nibbles holds weight j low and weight j + 16 high. Source: the ggml quantisation
formats, as the gguf package decodes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
# (bits, symmetric) -> name of the blocks, and bytes of one.
KINDS = {
    (4, True): ("Q4_0", 18), (4, False): ("Q4_1", 20), (5, True): ("Q5_0", 22),
    (5, False): ("Q5_1", 24), (8, True): ("Q8_0", 34),
}  # fmt: skip


def blocks(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """uint8 [N, K / 32 · bytes] of codes uint8 [N, K], fp16 scale [N, G] and zero uint8 [N, G].

    K and the columns of a group are multiples of 32. Where there are zero points, m = -zero·scale
    is rounded to fp16; everything else is exact.
    """
    rows, columns = codes.shape
    count = columns // BLOCK
    each = count // scale.shape[1]
    d = scale.repeat_interleave(each, 1).half()
    parts = [_bytes(d)]
    q = codes.reshape(rows, count, BLOCK)
    if zero is not None:
        m = -(zero.float() * scale.float()).half()
        parts.append(_bytes(m.repeat_interleave(each, 1)))
    if bits == 8:
        return torch.cat([*parts, (q ^ 128)], -1).reshape(rows, -1)
    if bits == 5:
        fifth = (q.long() >> 4) << torch.arange(BLOCK)
        whole = fifth.sum(-1, keepdim=True)
        parts.append(((whole >> torch.tensor([0, 8, 16, 24])) & 255).to(torch.uint8))
    low = q & 15
    parts.append(low[..., :16] | (low[..., 16:] << 4))
    return torch.cat(parts, -1).reshape(rows, -1)


def _bytes(values: Tensor) -> Tensor:
    """fp16 [N, B] -> uint8 [N, B, 2], low byte first."""
    return values.contiguous().view(torch.uint8).reshape(*values.shape, 2)
