"""What a weight makes of a layer norm's gain and shift, known before any token is.

    W ((x - mean) * r * g + s) = r * (W (g * x) - mean * (W g)) + W s,    r = 1 / deviation

So a kernel multiplies x * g as it does behind an RMS norm, and in the end takes the mean away with
W g and adds W s: two numbers of a row, made here in fp64 of all that the row multiplies with, a
product of low rank and sparse entries included.

Where the mean is large against the spread, x * g is rounded by a part of |x|, not of |x - mean|. As
much was lost before, when x was stored in as many bits.
"""

from __future__ import annotations

import torch

from . import coded, meaning
from .by_row import take_rows
from .problem import BEFORE, BEHIND, Parts, Problem
from .row import TILE_ROWS

BLOCK = 1 << 25  # weights that are decoded at a time


def centre(problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """The tensors that kernels read for a centred norm, in fp32.

    shift [K] is added to the normed input. Where the input is not rounded, centre [Np, 2] are W g
    and W s of the parts' rows. A vector that smooths is a part of both g and s.
    """
    gain = parts["gain"].double()
    shift = parts["shift"].double() if "shift" in parts else torch.zeros_like(gain)
    both = torch.stack([gain, shift])
    if problem.smooth:
        both = both * parts["smooth"].double()
    made = {"shift": both[1].float()}
    if not problem.made:
        short = (0, 0, 0, -problem.N % TILE_ROWS)
        rows = _products(problem, parts, both).T.float()
        made["centre"] = torch.nn.functional.pad(rows, short).contiguous()
    return made


def _products(problem: Problem, parts: Parts, vectors: torch.Tensor) -> torch.Tensor:
    """[2, N] of vectors [2, K], some rows of the weight at a time."""
    if problem.coded:
        left, right = coded.dense(problem, parts, vectors.dtype, ordered=True)
        return vectors @ right.T @ left.T
    plain = problem.without(*BEFORE, *BEHIND)
    found, step = [], max(1, BLOCK // problem.K)
    for rows in torch.arange(problem.N, device=vectors.device).split(step):
        some, taken = take_rows(plain, parts, rows)
        found.append(meaning.linear(some, taken, vectors))
    return torch.cat(found, 1)
