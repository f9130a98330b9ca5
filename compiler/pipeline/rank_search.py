"""What one factored weight alone does to the whole model's loss, rank by rank.

The dense model runs up to the weight's block once; from there on it runs again for every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ir.interpret import Fetch
from ..solvers.factor import factor
from .factoring import Factoring
from .measure import Env, Meter, Walk, batches, for_logits, loss

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Shares of a weight's numbers that are tried, as ASVD does; smaller ones where less must stay."""


def shares(keep: float) -> tuple[float, ...]:
    """Shares to try for a model that keeps ``keep`` in all."""
    lower = (s for s in (0.3, 0.2, 0.1, 0.05, 0.02) if s > keep - 0.2 and keep < 0.6)
    return (*SHARES, *lower)


def sensitivities(
    work: Factoring, tried: Mapping[str, Sequence[int]], tokens: Tensor
) -> tuple[dict[str, dict[int, float]], float]:
    """The model's loss with one unit factored at each tried rank, by part id, and the dense loss.

    Args:
        tokens: int64 [samples, length], the slice that losses are taken on.
    Raises:
        ModelError: the program gives no logits over these tokens, or a loss is not finite.
    """
    program = work.program
    options = for_logits(program, tokens, work.options)
    walk = Walk(program, device=options.device)
    out: dict[str, dict[int, float]] = {}
    with torch.no_grad():
        envs, at = batches(program, tokens, options), 0
    for unit, _, root in work.measured(work.units):
        while walk.segments[at].name != unit.sites[0].segment:
            with torch.no_grad():
                envs = walk.step(walk.segments[at], envs)
            at += 1
        ranks = tried[unit.part.id]
        made = factor(
            work.weight(unit), root, max(ranks), solver=work.how.solver, seed=work.how.seed
        )
        out[unit.part.id] = {}
        for rank in ranks:
            product = made.to(rank).factors.product
            parts = product.split([s.out_features for s in unit.sites])
            now = {p: t.to(walk.fetch(p)) for p, t in zip(unit.params, parts, strict=True)}
            out[unit.part.id][rank] = _ahead(walk, at, envs, now, tokens)
    return out, loss(program, tokens, options)


def _ahead(
    walk: Walk, at: int, envs: Sequence[Env], now: Mapping[str, Tensor], tokens: Tensor
) -> float:
    """The loss from a segment on, with other weights in the place of some."""
    meter = Meter(walk.program, tokens)

    def fetch(name: str) -> Tensor:
        return now[name] if name in now else walk.fetch(name)

    get: Fetch = fetch
    with torch.no_grad():
        for segment in walk.segments[at:]:
            envs = [
                walk.advanced(segment, e, walk.outputs(segment, e, fetch=get, observe=meter))
                for e in envs
            ]
            walk.forget()
    return meter.mean()
