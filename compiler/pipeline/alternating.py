"""Codes or zeros and low rank of one weight, found in turn: W ≈ Ŵ + A·B.

Each turn solves W less the factors at hand, then takes the best factors for what that lost. A start
with the weight's own leading directions hands them what is large in it, so that the grid of the
rest is fine (SVDQuant, arXiv 2411.05007); a start with the rest is LoRC. Turns do not always lower
the loss, so the best answer of all is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ir.scheme import LowRank
from ..solvers import Factor, Solution
from ..solvers.low_rank import low_rank
from .residual import compensate

STARTS = ("rest", "low_rank", "best")


def alternated(
    answer: Callable[[Tensor], Solution], weight: Tensor, low: LowRank, form: str,
    factor: Factor | None, columns: Tensor | None, rounds: int, start: str,
) -> Solution:  # fmt: skip
    """The solution of the rest, of the turn whose factors leave the least loss.

    Args:
        answer: solves the rest [m, n]. form, columns: see :func:`.residual.compensate`.
        rounds: how many times it is asked. start: ``rest`` begins without factors, ``low_rank``
            with those of the weight itself, ``best`` with both and goes on with the better one.
    """
    hessian = None if factor is None or form == "weights" else factor.hessian
    starts = [torch.zeros_like(weight)] if start != "low_rank" else []
    if start != "rest" and (rounds > 1 or start == "low_rank"):
        whole = weight.float()
        if columns is not None:
            whole = whole.index_fill(1, columns, 0.0)
        starts.append(low_rank(whole, low.rank, hessian).product.to(weight.dtype))
    best: tuple[float, Solution] | None = None
    from_here = starts[0]
    for turn in range(rounds):
        given = starts[turn] if turn < len(starts) else from_here
        solution = answer(weight - given)
        _, product, told = compensate(weight, solution.weight, low, form, factor, columns)
        if best is None or told["loss"] < best[0]:
            best, from_here = (told["loss"], solution), product.to(weight.dtype)
        elif turn >= len(starts):
            break
    assert best is not None
    return best[1]
