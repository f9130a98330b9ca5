"""A result whose channels are mixed back: who does it, by how many tokens.

For few tokens the linear's own kernel does: its programs leave whole rows in fp32, and those that
come last share the mixing and all that is behind it (`templates/_ending.py.j2`). They wait for each
other, which is safe as they are never more than processors: whoever they wait for has started, or
finds room. For many tokens calls behind the product cost little beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..compiler.ir.ops.rotation import mix
from ..compiler.ir.ops.semantic import activation, gated
from .ending import units_of
from .normed import FEW
from .prepack import Packed
from .problem import BEHIND, Problem

Tensors = dict[str, torch.Tensor]
Run = Callable[[torch.Tensor, Tensors], torch.Tensor]


def goes_apart(problem: Problem, M: int) -> bool:
    """Whether a call of M tokens, with no tile of its own, is mixed back behind its kernel."""
    return bool(problem.out_mixed) and M > FEW


def apart(
    ready: Callable[..., Run], packed: Packed, problem: Problem, x: torch.Tensor, sides: Tensors
) -> Run:
    """A call of many tokens: the product as ``ready`` makes it, then the rest by torch.

    The product is rounded to x's dtype before it is mixed.
    """

    def few(given: Tensors) -> Tensors:
        return {n: t for n, t in given.items() if n not in ("bias", "residual", "turn")}

    plain = packed.problem.without(*BEHIND)
    product = Packed(packed.row, plain, few(packed.tensors), few(packed.sides))
    run = ready(product, x, None, few(sides))

    def then(x: torch.Tensor, sides: Tensors) -> torch.Tensor:
        given = {**packed.tensors, **packed.sides, **sides}
        y = mixed_back(problem, run(x, few(sides)), given["turn"])
        if problem.bias:
            y = y + given["bias"].to(y.dtype)
        if problem.pairs:
            y = gated(*y.chunk(2, -1), act=problem.act)
        elif problem.act:
            y = activation(y, act=problem.act)
        return y + given["residual"] if problem.residual else y

    return then


def mixed_back(problem: Problem, y: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """y [M, N], each section mixed, then times `turn` as it is packed; in y's dtype, but at least
    fp32 between."""
    wide = y.to(torch.promote_types(torch.float32, y.dtype))
    units = units_of(problem).to(wide)
    parts = [mix(part) for part in wide.split(problem.out_sections, -1)]
    return (torch.cat(parts, -1) * (turn.to(wide) / units)).to(y.dtype)
