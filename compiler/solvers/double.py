"""Scales of a grid as codes of their own: double quantisation, and the record of bilevel grids.

All scales of a matrix, row after row, are cut into blocks of 256. With ``mean`` the mean of them
all, a scale is ``mean + (q - 128) * step``, one fp32 step per block: 8 + 32/256 bits for each.

Source: QLoRA (arXiv 2305.14314), whose codes are a dynamic map; here they are uniform.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Scales that share a step."""


class DoubleScales(NamedTuple):
    """Codes uint8 ``[m * G]`` in storage order, step fp32 ``[blocks]``, mean fp32 ``[1]``."""

    codes: Tensor
    step: Tensor
    mean: Tensor

    def decoded(self, groups: int, rows: int) -> Tensor:
        """The scales fp32 ``[G, m]``, by the operations that the graph decodes with."""
        q = self.codes.float() - 128.0
        flat = q * self.step.repeat_interleave(BLOCK)[: len(q)] + self.mean
        return flat.view(rows, groups).t()


ROWS = 16
"""Output rows that share the range of their scales in a bilevel grid."""


class BilevelScales(NamedTuple):
    """Codes uint8 ``[G, m]``; step and low fp16 ``[G, blocks]``, one per `ROWS` rows."""

    codes: Tensor
    step: Tensor
    low: Tensor

    def decoded(self) -> Tensor:
        """The scales fp32 ``[G, m]``, by the operations that the graph decodes with."""
        rows = self.codes.shape[1]
        step, low = (t.float().repeat_interleave(ROWS, 1)[:, :rows] for t in (self.step, self.low))
        return self.codes.float() * step + low


ScaleCodes = DoubleScales | BilevelScales


def double_scales(scale: Tensor, empty: Tensor, unit: float = 1.0) -> DoubleScales:
    """Round positive scales ``[G, m]``, times unit, to 8-bit codes that decode to positive ones.

    empty: bool ``[G, m]``, groups without a weight, whose scale is free.
    """
    flat = (scale.double() * unit).t().reshape(-1)
    free = empty.t().reshape(-1)
    mean = flat[~free].mean() if bool((~free).any()) else flat.new_ones(())
    mean = mean.float()
    off = torch.where(free, 0.0, flat - mean.double())
    padded = torch.nn.functional.pad(off, (0, -len(off) % BLOCK)).view(-1, BLOCK)
    step = (padded.abs().amax(1) / 127.5).float()
    step = torch.where(step > 0, step, torch.ones_like(step))
    q = (padded / step.double()[:, None]).round().clamp_(-128, 127)
    # A positive scale that rounds to nothing is at most half a step away: one code up is positive.
    low = q.float() * step[:, None] + mean <= 0
    q = q + low
    codes = (q.view(-1)[: len(off)] + 128).to(torch.uint8)
    return DoubleScales(codes, step, mean.view(1))
