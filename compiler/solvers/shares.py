"""How many weights each layer gives up, so that all layers together give up an exact share.

Every weight has a score: what the model's loss is expected to rise by when it goes. Ranked over all
layers, the lowest ones go; what falls to a layer is its share. For scores that add up no other
choice of as many weights costs less. The second-order score ½·w²·F, F the diagonal of the Fisher
information, is that of Optimal Brain Damage (LeCun et al., 1989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.errors import ModelError

_SHIFT = 15
BINS = 1 << 16
"""Scores are ranked by the first 16 bits after the sign of their fp32 pattern: to one part in 256.

A layer is then 65536 counts, whatever its size, and no score has to be kept.
"""
MOST = 0.99
"""No layer gives up more than this share."""


def histogram(score: Tensor) -> Tensor:
    """Counts int64 [BINS] of scores of any shape, not negative, in ascending order.

    Raises:
        ModelError: a score is negative or not finite.
    """
    flat = score.detach().flatten().float()
    if len(flat) and not (bool(torch.isfinite(flat).all()) and float(flat.min()) >= 0):
        raise ModelError("expected finite scores of weights, none below 0, found others")
    return torch.bincount(flat.abs().view(torch.int32) >> _SHIFT, minlength=BINS).cpu()


def share_out(counts: Sequence[Tensor], share: float, spread: float) -> list[int]:
    """Weights that each layer gives up; their sum is ``share`` of all, rounded once.

    Args:
        counts: a `histogram` per layer.
        spread: how far a layer's share may lie from the overall one; 0 is uniform to one weight.
    Returns:
        One count per layer. Of all counts within the band these lose least, as far as scores can
        be told apart; layers with equal histograms differ by at most one weight.
    """
    sizes = torch.stack([c.sum() for c in counts])
    goal = round(share * int(sizes.sum()))
    low, high = max(0.0, share - spread), min(max(MOST, share), share + spread)
    # (0.1 + 0.05) * 20 is a hair above 3, which must not become 4.
    hair = 1e-12
    lows = torch.tensor([math.floor(low * n * (1 + hair)) for n in sizes.tolist()])
    highs = torch.tensor([math.ceil(high * n * (1 - hair)) for n in sizes.tolist()])
    # Column b: every layer gives up its bins below b, as far as the band lets it.
    below = torch.nn.functional.pad(torch.stack(list(counts)).cumsum(1), (1, 0))
    below = below.clamp(lows[:, None], highs[:, None])
    edge = int(torch.searchsorted(below.sum(0), goal))
    if edge == 0:
        return _proportional(lows, torch.zeros_like(lows), goal)
    start = below[:, edge - 1]
    return _proportional(start, below[:, edge] - start, goal)


def _proportional(start: Tensor, room: Tensor, goal: int) -> list[int]:
    """start plus what is missing from ``goal``, in proportion to room and exact in sum."""
    missing, free = goal - int(start.sum()), int(room.sum())
    if missing == 0 or free == 0:
        return [int(n) for n in start]
    exact = [int(r) * missing for r in room]
    parts = [e // free for e in exact]
    by_rest = sorted(range(len(parts)), key=lambda i: -(exact[i] % free))
    for i in by_rest[: missing - sum(parts)]:
        parts[i] += 1
    return [int(n) + p for n, p in zip(start, parts, strict=True)]
