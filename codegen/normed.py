"""The norm of a linear's result: who makes it, by how many tokens.

For few tokens the linear's own kernel does, and adds the residual too: the last of its programs
reads whole rows, one token after the other (`templates/_normed.py.j2`). For many, one program
would be busy with them while all others have gone; there two calls behind the product cost little
beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compiler.ir.ops.semantic import rms_norm
from .prepack import Packed
from .problem import Problem

FEW = 16  # tokens up to which one program makes the norms of all
# Side tensors that the norm and what follows it read.
_SIDES = ("out_gain", "residual")
Tensors = dict[str, torch.Tensor]
Run = Callable[[torch.Tensor, Tensors], torch.Tensor]


def without(problem: Problem) -> Problem:
    """The same without the norm of its result, and the sum behind that."""
    return problem.without("out_norm", "out_eps", "residual")


def apart(
    ready: Callable[..., Run], packed: Packed, problem: Problem, x: torch.Tensor, sides: Tensors
) -> Run:
    """A call of many tokens: the product as ``ready`` makes it, then norm and sum by torch.

    The product is rounded to x's dtype before its norm, and the norm before the sum.
    """

    def few(given: Tensors) -> Tensors:
        return {n: t for n, t in given.items() if n not in _SIDES}

    product = Packed(packed.row, without(packed.problem), packed.tensors, few(packed.sides))
    run = ready(product, x, None, few(sides))

    def then(x: torch.Tensor, sides: Tensors) -> torch.Tensor:
        given: Any = {**packed.sides, **sides}
        y = rms_norm(run(x, few(sides)), given["out_gain"], eps=problem.out_eps)
        return y + given["residual"] if problem.residual else y

    return then
