"""Inputs that a kernel makes before it multiplies: normed, smoothed, and put on a grid.

Rows whose weights are no codes of the input's own kind read x in its dtype. For few tokens the
programs of a launch that start first make it, a token each, and all others wait for them (see
`templates/_made.py.j2`; tickets and waiting as beside a product of low rank). For many a kernel of
its own does before, and what follows is the call of a linear whose input is on a grid already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import start
from .prepack import Packed
from .problem import BEFORE, Problem
from .render import makes
from .row import KernelRow
from .rows.made import MADE_INPUT
from .rows.rounded import round_config

FEW = 16  # tokens up to which the product's own programs make its input
# Side tensors that are read as x is made.
_SIDES = ("gain", "smooth", "shift", "in_scale", "limit")
Tensors = dict[str, torch.Tensor]
Run = Callable[[torch.Tensor, Tensors], torch.Tensor]


def goes_before(row: KernelRow, problem: Problem, M: int) -> bool:
    """Whether a call of M tokens, with no tile of its own, has x made by a launch of its own."""
    return makes(row, problem) and M > FEW


def without(problem: Problem) -> Problem:
    """The same over an input that is made already."""
    return problem.without(*BEFORE, "rounds")


def making(problem: Problem) -> Problem:
    """What makes x must know: nothing of the weight."""
    kept = {n: getattr(problem, n) for n in ("x_dtype", "rounds", *BEFORE)}
    return Problem(problem.N, problem.K, **kept)


def apart(
    ready: Callable[..., Run], packed: Packed, problem: Problem, x: torch.Tensor, sides: Tensors
) -> Run:
    """A call of many tokens: x is made by a launch of its own, the rest is as ``ready`` does it."""

    def few(given: Tensors) -> Tensors:
        return {n: t for n, t in given.items() if n not in _SIDES}

    plain = Packed(packed.row, without(packed.problem), few(packed.tensors), few(packed.sides))
    alone, config = making(problem), round_config(problem.K)
    M = x.numel() // problem.K
    kept = {**packed.tensors, **packed.sides}
    run = ready(plain, x.new_empty(x.shape), None, few(sides))

    def then(x: torch.Tensor, sides: Tensors) -> torch.Tensor:
        made = x.new_empty(x.shape)
        given = {**start.joined({**kept, **sides}), "x": x.reshape(M, -1), "y": made}
        if alone.mixed_twice:
            given["between"] = torch.empty(M, problem.K, device=x.device)
        start.launch_row(MADE_INPUT, alone, config, M, given, grid=(1, M))
        return run(made, few(sides))

    return then
